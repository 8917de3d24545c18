"""CORM: what recent queries found important, the example U15, and its size under a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view

from kvlocal.policies import make_policy


class Trace:
    """One head, token after token: the positions held, and the last query that found each of them important."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.last: list[float] = []
        self.n_seen = 0

    def step(self, probabilities: list[float]) -> None:
        self.positions.append(self.n_seen)
        self.last.append(0)
        self.n_seen += 1
        assert len(probabilities) == len(self.positions)
        for slot, p in enumerate(probabilities):
            if p >= 1 / len(probabilities):
                self.last[slot] = self.n_seen

    def view(self):  # type: ignore[no-untyped-def]
        return layer_view(np.array([self.last]), 1, [np.array(self.positions, np.int32)], self.n_seen)

    def keep(self, slots: np.ndarray) -> None:
        self.positions = [self.positions[i] for i in slots]
        self.last = [self.last[i] for i in slots]


def test_u15_a_token_that_no_recent_query_needs_is_evicted() -> None:
    policy = make_policy("corm", {"queries": 2, "window": 1, "cap": "no"})
    trace, kept = Trace(), []
    rows = [
        [1.0],
        [0.6, 0.4],
        [0.5, 0.2, 0.3],
        [0.5, 0.1, 0.1, 0.3],
        [0.6, 0.1, 0.3],
        [0.3, 0.1, 0.4, 0.2],
    ]
    for row in rows:
        trace.step(row)
        if policy.due(len(trace.positions), 1):
            trace.keep(evict(policy, cache_view(1, trace.view()))[1][0][0])
        kept.append(list(trace.positions))
    assert kept[2:] == [[0, 1, 2], [0, 3], [0, 3, 4], [0, 4, 5]]


def test_a_key_is_minor_only_if_it_is_for_every_query_head_of_the_group() -> None:
    last = np.array([[9, 0, 0, 0, 0.0], [0, 0, 9, 0, 0]])
    policy = make_policy("corm", {"queries": 3, "window": 1, "cap": "no"})
    assert evict(policy, cache_view(1, layer_view(last, 1, n_seen=10)))[1][0][0].tolist() == [0, 2, 4]


def test_a_budget_caps_what_is_important_least_recent_first_then_oldest() -> None:
    last = np.array([[8, 9, 7, 9, 8, 0.0]])
    args = {"queries": 5, "window": 1}
    view = layer_view(last, 1, n_seen=10)
    assert evict(make_policy("corm", args), cache_view(6, view))[1][0][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert evict(make_policy("corm", args), cache_view(4, view))[1][0][0].tolist() == [1, 3, 4, 5]
    assert evict(make_policy("corm", args), cache_view(3, view))[1][0][0].tolist() == [1, 3, 5]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(6, 40), st.integers(0, 2**32 - 1))
def test_without_queries_the_budget_is_met_by_one_horizon_for_the_layer(
    n_head_kv: int, group: int, n: int, seed: int
) -> None:
    """What a layer keeps outside the window was important no earlier than what it drops."""
    rng = np.random.default_rng(seed)
    last = rng.integers(0, n + 1, (n_head_kv * group, n)).astype(float)
    policy = make_policy("corm", {"window": 2})
    budget = int(rng.integers(policy.min_budget, n))
    budgets, kept = evict(policy, cache_view(budget, layer_view(last, n_head_kv)))
    assert budgets.sum() == n_head_kv * budget
    top = last.reshape(n_head_kv, group, n).max(1)
    inside, outside = [], []
    for h, slots in enumerate(kept[0]):
        assert {n - 2, n - 1} <= set(slots.tolist())
        inside += [top[h, j] for j in slots if j < n - 2]
        outside += [top[h, j] for j in range(n - 2) if j not in slots]
    assert not inside or not outside or min(inside) >= max(outside)


@pytest.mark.parametrize(
    ("args", "held", "budget", "due"),
    [
        ({}, 101, 100, True),
        ({}, 100, 100, False),
        ({"queries": 64}, 96, 200, False),
        ({"queries": 64}, 97, 200, True),
        ({"queries": 64}, 60, 50, True),
        ({"queries": 64, "cap": "no"}, 60, 50, False),
    ],
)
def test_it_is_due_by_its_own_size_or_by_the_budget(args: dict[str, object], held: int, budget: int, due: bool) -> None:
    assert make_policy("corm", args).due(held, budget) is due
