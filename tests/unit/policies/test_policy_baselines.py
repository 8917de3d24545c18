"""Worked examples of the baselines, and their sequences step by step against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view

from kvlocal.policies import LayerView, Policy, make_policy
from kvlocal.policies.keydiff import difference

KEYS = np.array([[1.0, 0], [2, 0], [0, 3], [1, 1]])
UNIFORM = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]


def with_keys(keys: np.ndarray) -> LayerView:
    view = layer_view(np.zeros((1, len(keys))))
    view.read_kv = lambda h: (keys, keys)
    return view


def kept_of(policy: Policy, layer: LayerView, budget: int) -> list[list[int]]:
    return [slots.tolist() for slots in evict(policy, cache_view(budget, layer))[1][0]]


def test_keydiff_example() -> None:
    np.testing.assert_allclose(difference(KEYS), [-0.8459, -0.8459, -0.5334, -0.9753], atol=5e-5)
    # the newest slot stays whatever its score
    assert kept_of(make_policy("keydiff"), with_keys(KEYS[[0, 1, 3, 2]]), 3) == [[0, 1, 3]]


def test_knorm_example() -> None:
    assert kept_of(make_policy("knorm"), with_keys(KEYS), 2) == [[0, 3]]
    assert kept_of(make_policy("knorm"), with_keys(KEYS), 3) == [[0, 1, 3]]


def test_mass_of_uniform_attention() -> None:
    mass = UNIFORM.sum(axis=0)
    np.testing.assert_allclose(mass, [25 / 12, 13 / 12, 7 / 12, 1 / 4])
    layer = layer_view(mass[None])
    policy = make_policy("observed")
    np.testing.assert_allclose(
        policy.scores(layer, policy.region(layer))[0], [0.5208, 0.3611, 0.2917, -np.inf], atol=5e-5
    )
    assert kept_of(make_policy("h2o"), layer, 2) == [[0, 3]]
    assert kept_of(make_policy("h2o", {"recent": 0.67}), layer, 3) == [[0, 2, 3]]


def run(policy: Policy, rows: list[np.ndarray], budget: int) -> tuple[list[list[int]], np.ndarray]:
    """One token per row of attention ``[n_head, n_slots]``, an eviction after each; what is held, and the mass."""
    positions, mass, held = np.arange(0), np.zeros((len(rows[0]), 0)), []
    for t, row in enumerate(rows):
        positions = np.r_[positions, t]
        mass = np.pad(mass, ((0, 0), (0, 1))) + row
        layer = layer_view(row, 1, [positions], t + 1)
        layer.read_mass = lambda mass=mass: mass
        slots = evict(policy, cache_view(budget, layer))[1][0][0]
        positions, mass = positions[slots], mass[:, slots]
        held.append(positions.tolist())
    return held, mass


def test_h2o_sequence() -> None:
    """Totals are carried along by what stays."""
    rows = [
        [1],
        [0.5, 0.5],
        [0.4, 0.2, 0.4],
        [0.3, 0.3, 0.2, 0.2],
        [0.2, 0.1, 0.3, 0.2, 0.2],
        [0.1, 0.4, 0.2, 0.2, 0.1],
    ]
    held, mass = run(make_policy("h2o"), [np.array([r]) for r in rows], 4)
    assert held[4:] == [[0, 1, 3, 4], [0, 1, 4, 5]]
    np.testing.assert_allclose(mass[0], [2.5, 1.5, 0.4, 0.1])


def test_tova_sequence() -> None:
    """Even the newest token can go; the heads of a layer decide together."""
    first = [np.ones((2, n)) for n in (1, 2, 3)]
    rows = [*first, np.array([[0.5, 0.1, 0.25, 0.15], [0.1, 0.5, 0.25, 0.15]]), np.array([[0.4, 0.1, 0.2, 0.3]] * 2)]
    assert run(make_policy("tova"), rows, 3)[0][3:] == [[0, 1, 2], [0, 2, 4]]
    assert run(make_policy("tova", {"newest": "keep"}), rows[:4], 3)[0][3] == [0, 1, 3]


def test_tova_follows_each_kv_head_where_they_hold_different_tokens() -> None:
    layer = layer_view(np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]), 2, [np.array([0, 1, 5]), np.array([0, 2, 5])], 6)
    assert kept_of(make_policy("tova"), layer, 1) == [[2], [0]]
    assert kept_of(make_policy("tova"), layer_view(layer.scores, 2), 1) == [[2], [2]]


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 25))
@settings(max_examples=30, deadline=None)
def test_sequences_equal_plain_loops(seed: int, budget: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.dirichlet(np.ones(min(t, budget) + 1), 2) for t in range(n)]
    for name in ("h2o", "tova"):
        positions, acc, want = [], np.zeros(0), []
        for t, row in enumerate(rows):
            positions.append(t)
            acc = np.append(acc, 0.0) + row.sum(axis=0)
            if len(positions) > budget:
                recent = max(1, budget // 2) if name == "h2o" else 0
                score = acc if name == "h2o" else row.mean(axis=0)
                old = len(positions) - recent
                best = np.sort(np.argsort(-score[:old], kind="stable")[: budget - recent])
                keep = [*best.tolist(), *range(old, old + recent)]
                positions, acc = [positions[i] for i in keep], acc[keep]
            want.append(list(positions))
        assert run(make_policy(name), rows, budget)[0] == want


@pytest.mark.parametrize("seed", [0, 1])
def test_random_draws_the_same_tokens_again(seed: int) -> None:
    """A token that survived does not lose to others that had lost to it."""
    policy = make_policy("random", {"seed": seed, "window": 1})
    first = kept_of(policy, layer_view(np.zeros((2, 100))), 40)
    again = layer_view(np.zeros((2, 40)), 2, [np.array(slots) for slots in first], 100)
    at_once = kept_of(policy, layer_view(np.zeros((2, 100))), 20)
    twice = [np.array(f)[s].tolist() for f, s in zip(first, kept_of(policy, again, 20), strict=True)]
    assert twice == at_once
    assert first[0] != first[1]
    assert first != kept_of(make_policy("random", {"seed": seed + 2, "window": 1}), layer_view(np.zeros((2, 100))), 40)
