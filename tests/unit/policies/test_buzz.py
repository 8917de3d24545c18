"""BUZZ: worked examples, sizes over time, and the whole method against an independent model."""

from __future__ import annotations

import buzz_reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view

from kvlocal.errors import UsageError
from kvlocal.policies import make_policy
from kvlocal.policies.buzz import Buzz


class Run:
    """One layer of one sequence whose attention the test makes up; an eviction follows every step that is due."""

    def __init__(self, policy: Buzz, n_head_kv: int = 1, group: int = 1, budget: int = 0) -> None:
        self.policy, self.group, self.budget = policy, group, budget
        self.positions = [np.arange(0)] * n_head_kv
        self.mass = np.zeros((n_head_kv * group, 0))
        self.n_seen = self.evicted_at = self.old = 0

    def step(self, attention: np.ndarray) -> bool:
        """``attention``: ``[n_head, n_new, n_held + n_new]``."""
        n_new = attention.shape[1]
        new = np.arange(self.n_seen, self.n_seen + n_new)
        self.positions = [np.r_[p, new] for p in self.positions]
        self.mass = np.pad(self.mass, ((0, 0), (0, n_new))) + attention.sum(axis=1)
        self.n_seen += n_new
        if not self.policy.due(float(len(self.positions[0])), self.budget):
            return False
        layer = layer_view(self.mass, len(self.positions), self.positions, self.n_seen)
        layer.evicted_at = self.evicted_at
        _, kept = evict(self.policy, cache_view(self.budget, layer))
        self.positions = [p[s] for p, s in zip(self.positions, kept[0], strict=True)]
        self.mass = np.array([self.mass[i, kept[0][i // self.group]] for i in range(len(self.mass))])
        self.evicted_at = self.n_seen
        self.old = len(self.positions[0]) - self.policy.sink - self.policy.window
        return True

    def sizes(self, prompt: int, n: int) -> list[tuple[int, int, int]]:
        """(tokens seen, old, held) after every eviction, with attention that does not matter."""
        out = []
        for n_new in ([prompt] if prompt else []) + [1] * n:
            if self.step(np.zeros((len(self.mass), n_new, len(self.positions[0]) + n_new))):
                out.append((self.n_seen, self.old, len(self.positions[0])))
        return out


def tiny(sink: int, window: int, stride: int, threshold: int, **args: str) -> Buzz:
    return Buzz(sink=sink, window=window, stride=stride, threshold=threshold, **args)


def test_first_and_later_evictions() -> None:
    """Nothing at the threshold; ties go to the older; old slots go by index whatever they scored."""
    run = Run(tiny(1, 2, 3, 4))
    assert not run.step(np.pad(np.array([[[9, 0.1, 0.5, 0.2, 0.3, 0.3, 0]]]), ((0, 0), (6, 0), (0, 0))))
    assert run.step(np.array([[[0, 0, 0, 0, 0, 0, 0, 1.0]]]))
    assert run.positions[0].tolist() == [0, 2, 4, 6, 7] and run.old == 2
    rows = [(0.2, 0.1, 0.1, 0.3, 0.1, 0.2), (0.2, 0, 0, 0.4, 0.2, 0.1, 0.1), (0.1, 0, 0, 0.1, 0.5, 0.1, 0.1, 0.1)]
    assert [run.step(np.array([[row]])) for row in rows] == [False, False, True]
    assert run.positions[0].tolist() == [0, 2, 7, 9, 10] and run.old == 2


def test_heads_choose_for_themselves() -> None:
    run = Run(tiny(0, 1, 3, 5), n_head_kv=2)
    row = np.array([[0.1, 0.2, 0.05, 0.3, 0.1, 0.05, 0.2], [0.05, 0.1, 0.25, 0.1, 0.1, 0.2, 0.2]])
    assert run.step(np.pad(row[:, None], ((0, 0), (6, 0), (0, 0))))
    assert [p.tolist() for p in run.positions] == [[1, 3, 6], [2, 5, 6]] and run.old == 2


@pytest.mark.parametrize(("old", "kept"), [("stride", [0, 2, 3, 5]), ("localmax", [1, 2, 3, 5])])
def test_old_slots_are_thinned_by_index(old: str, kept: list[int]) -> None:
    policy = tiny(0, 1, 4, 4, old=old)
    layer = layer_view(np.array([[1, 2, 9, 8, 0.5, 0]]))
    layer.evicted_at = 4  # slots 0 to 2 were old then, 3 was the window
    assert [s.tolist() for s in evict(policy, cache_view(0, layer))[1][0]] == [kept]


def test_uniform_prompt() -> None:
    run = Run(tiny(1, 1, 3, 5))
    run.step((np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None])[None])
    np.testing.assert_allclose(run.mass[0], [2.7179, 1.7179, 0.6345, 0.125], atol=5e-5)
    assert run.positions[0].tolist() == [0, 1, 4, 7]


def test_query_heads_of_a_group_are_neighbours() -> None:
    """KV head 0 sums query heads 0 and 1: (5, 3); KV head 1 sums 2 and 3: (1, 5)."""
    run = Run(tiny(0, 1, 3, 1), n_head_kv=2, group=2)
    scores = np.array([[5, 1, 0], [0, 2, 0], [1, 4, 0], [0, 1, 0]], float)
    assert run.step(np.pad(scores[:, None], ((0, 0), (2, 0), (0, 0))))
    assert [p.tolist() for p in run.positions] == [[0, 2], [1, 2]]


def test_sizes_over_time() -> None:
    defaults = {"sink": 4, "window": 160, "stride": 5, "threshold": 400}
    assert Run(Buzz(**defaults)).sizes(0, 1811) == [
        (565, 81, 245), (885, 91, 255), (1195, 93, 257), (1503, 93, 257), (1811, 93, 257)
    ]  # fmt: skip
    assert [held for _, _, held in Run(Buzz(**defaults)).sizes(1000, 0)] == [332]
    assert [held for _, _, held in Run(Buzz(**defaults)).sizes(10000, 2)] == [2132, 821, 384]
    run = Run(tiny(2, 4, 3, 10))
    run.sizes(0, 200)
    assert len(run.positions[0]) == 13
    with pytest.raises(UsageError, match="stride=2"):
        Buzz(stride=2)


def test_a_prompt_that_fits_at_once() -> None:
    policy = Buzz(threshold=400, prefill_fit="yes")
    (size,) = Run(policy).sizes(10000, 2)
    assert size[1] <= policy.steady(0) == 93
    assert Run(policy).sizes(600, 0) == Run(Buzz(threshold=400)).sizes(600, 0)


def test_slot_zero_without_sinks_stays_for_ever() -> None:
    run = Run(tiny(0, 4, 3, 10))
    run.sizes(0, 400)
    assert run.positions[0][0] == 0


@pytest.mark.parametrize("budget", [200, 411, 1000, 4096])
def test_the_budget_is_the_mean_size(budget: int) -> None:
    policy = make_policy("buzz")
    run, held = Run(policy, budget=budget), []
    for _ in range(12 * budget):
        run.step(np.zeros((1, 1, len(run.positions[0]) + 1)))
        held.append(len(run.positions[0]))
    assert np.mean(held[6 * budget :]) == pytest.approx(budget, abs=max(3, 0.02 * budget))
    assert max(held) == policy.peak(budget)


def test_mean_length_of_a_summary() -> None:
    """The paper's setting: 882 tokens of prompt, 150 generated: 382.5 against 956.5."""
    run = Run(Buzz(threshold=400))
    held = []
    for n_new in [882] + [1] * 149:
        run.step(np.zeros((1, n_new, len(run.positions[0]) + n_new)))
        held.append(len(run.positions[0]))
    assert np.mean(held) == 382.5
    assert np.mean(882 + np.arange(150)) == 956.5


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_on_random_traces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sink, window, stride, threshold = (int(rng.integers(low, high)) for low, high in ((0, 4), (1, 6), (3, 7), (1, 15)))
    n_head_kv, group = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    run = Run(tiny(sink, window, stride, threshold), n_head_kv, group)
    reference = buzz_reference.Buzz(sink, window, stride, threshold)
    for t in range(40):
        n_new = int(rng.integers(1, 60)) if t == 0 else int(rng.integers(1, 4))
        n = len(run.positions[0]) + n_new
        attention = rng.random((n_head_kv * group, n_new, n))
        n_seen = run.n_seen
        summed = attention.reshape(n_head_kv, group, n_new, n).sum(axis=1)
        assert run.step(attention) == reference.step(summed, np.arange(n_seen, n_seen + n_new))
        assert np.array_equal(run.positions, reference.pos)
