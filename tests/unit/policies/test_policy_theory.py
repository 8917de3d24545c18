"""The theory behind Ada-KV, checked numerically: the bound, the optimality of both choices, the order of variants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view, mass

from kvlocal.policies import make_policy
from kvlocal.policies.parts.allocation import mix, safe_counts, top_counts
from kvlocal.policies.parts.scoring import reduce_groups, top

SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1))


def draw_attention(seed: int, n_head: int, n: int, ties: bool = False) -> np.ndarray:
    """Attention rows ``[n_head, n]`` that sum to 1, from flat to peaked."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 4, (n_head, n)).astype(float) if ties else np.exp(rng.normal(0, 3, (n_head, n)))
    return rows / rows.sum(axis=1, keepdims=True)


def losses(attention: np.ndarray, values: np.ndarray, kept: list[np.ndarray]) -> tuple[float, float, float]:
    """L1 error of a layer's output after eviction, and its two bounds; ``values[h, j]`` is ``v_{h,j} W_h``."""
    error, tight, loose = 0.0, 0.0, 0.0
    largest = np.abs(values).sum(axis=-1).max(axis=-1)
    for a, v, slots, c in zip(attention, values, kept, largest, strict=True):
        kept_mass = a[slots].sum()
        error = error + a @ v - a[slots] @ v[slots] / kept_mass
        tight += 2 * c * (1 - kept_mass)
        loose += 2 * largest.max() * (1 - kept_mass)
    return float(np.abs(error).sum()), tight, loose


def test_bound_is_tight_for_distinct_unit_vectors():
    attention = np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    values = np.eye(8).reshape(2, 4, 8)
    counts = top_counts(attention, 4)
    assert counts.tolist() == [1, 3]
    adaptive = [top(row, k) for row, k in zip(attention, counts, strict=True)]
    assert [s.tolist() for s in adaptive] == [[0], [0, 1, 2]]
    assert losses(attention, values, adaptive) == pytest.approx((0.8, 0.8, 0.8))
    assert losses(attention, values, [top(row, 2) for row in attention]) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["snapkv", "ada-snapkv"])
@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(4, 30), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_bound_holds_for_what_policies_keep(name, seed, n_head_kv, group, n, extra):
    attention = draw_attention(seed, n_head_kv * group, n)
    values = np.random.default_rng(seed).normal(size=(n_head_kv * group, n, 5))
    view = cache_view(2 + extra, layer_view(attention, n_head_kv))
    _, kept = evict(make_policy(name, {"window": 2}), view)
    error, tight, loose = losses(attention, values, [kept[0][h // group] for h in range(n_head_kv * group)])
    assert error <= tight * (1 + 1e-9) + 1e-9
    assert tight <= loose * (1 + 1e-9) + 1e-9


@given(SEEDS, st.integers(1, 8), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_top_of_a_head_is_the_best_subset(seed, n, ties, data):
    row = draw_attention(seed, 1, n, ties)[0]
    k = data.draw(st.integers(0, n))
    best = max(row[list(subset)].sum() for subset in itertools.combinations(range(n), k))
    assert row[top(row, k)].sum() == pytest.approx(best)


@given(SEEDS, st.integers(1, 4), st.integers(1, 8), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_adaptive_counts_are_the_best_division(seed, n_head, n, ties, data):
    scores = draw_attention(seed, n_head, n, ties)
    total = data.draw(st.integers(0, scores.size))
    prefix = np.pad(np.sort(scores, axis=1)[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0)))
    best = max(
        sum(prefix[h, k] for h, k in enumerate(division))
        for division in itertools.product(range(n + 1), repeat=n_head)
        if sum(division) == total
    )
    assert mass(scores, top_counts(scores, total)) == pytest.approx(best)


@given(SEEDS, st.integers(1, 6), st.integers(1, 30), st.booleans(), ALPHAS, st.data())
@settings(max_examples=200, deadline=None)
def test_adaptive_beats_protect_beats_mix_beats_uniform(seed, n_head, n, ties, alpha, data):
    scores = draw_attention(seed, n_head, n, ties)
    budget = data.draw(st.integers(0, n))
    uniform = np.full(n_head, budget)
    adaptive = top_counts(scores, n_head * budget)
    protect = top_counts(scores, n_head * budget, safe_counts(uniform, alpha))
    chain = [mass(scores, c) for c in (adaptive, protect, mix(adaptive, uniform, alpha), uniform)]
    assert all(better >= worse - 1e-12 for better, worse in itertools.pairwise(chain)), chain


@given(SEEDS, st.integers(1, 3), st.integers(5, 40), st.booleans(), ALPHAS, st.integers(1, 15))
@settings(max_examples=60, deadline=None)
def test_the_order_holds_for_ragged_heads(seed, group, n, ties, alpha, extra):
    """The same chain through the policies, with heads that cannot take their equal share."""
    rng = np.random.default_rng(seed)
    positions = [np.unique(np.r_[rng.integers(0, n, rng.integers(1, n)), n - 2, n - 1]) for _ in range(3)]
    longest = max(map(len, positions))
    view = cache_view(2 + extra, layer_view(draw_attention(seed, 3 * group, longest, ties), 3, positions, n))
    args = {"window": 2, "pool": "none"}
    ada = {"alpha": alpha, **args}
    policies = [
        make_policy("ada-snapkv", {**args, "alpha": 0.0}),
        make_policy("ada-snapkv", {**ada, "safeguard": "protect"}),
        make_policy("ada-snapkv", {**ada, "safeguard": "mix"}),
        make_policy("snapkv", args),
    ]
    scores = reduce_groups(view.layers[0].scores, 3, "mean")
    chain = [sum(scores[h][s].sum() for h, s in enumerate(evict(policy, view)[1][0])) for policy in policies]
    assert all(better >= worse - 1e-12 for better, worse in itertools.pairwise(chain)), chain


@given(SEEDS, st.integers(1, 4), st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_mean_of_a_group_keeps_the_most_mass(seed, group, n, data):
    attention = draw_attention(seed, group, n)
    k = data.draw(st.integers(0, n))
    best = max(attention[:, list(subset)].sum() for subset in itertools.combinations(range(n), k))
    assert attention[:, top(reduce_groups(attention, 1, "mean")[0], k)].sum() == pytest.approx(best)
