"""Random cross-checks against an independent numpy model of the methods."""

from __future__ import annotations

import ada_reference as reference
import numpy as np
import pytest
from policy_views import cache_view, evict, layer_view, mass

from kvlocal.policies import make_policy
from kvlocal.policies.parts.allocation import mix, top_counts
from kvlocal.policies.parts.compat import mix_adakv, pyramid_adakv, pyramid_kvpress


def draw_model(rng: np.random.Generator):
    n_head_kv, group = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    window = int(rng.integers(1, 6))
    n = window + int(rng.integers(5, 60))
    q, k = rng.normal(size=(n_head_kv * group, n, 8)) * 2, rng.normal(size=(n_head_kv, n, 8))
    budget = int(rng.integers(window + 1, n))
    return q, k, n_head_kv, window, n, budget


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("seed", range(30))
def test_snapkv(seed, pool):
    rng = np.random.default_rng(seed)
    q, k, n_head_kv, window, n, budget = draw_model(rng)
    kernel, agg = int(rng.choice([1, 3, 5, 7])), str(rng.choice(["mean", "max"]))
    expected = reference.snap_scores(q, k, window, kernel, pool + "pool", agg)
    attention = reference.window_attention(q, k, window).mean(axis=1)
    policy = make_policy("snapkv", {"window": window, "kernel": kernel, "pool": pool, "agg": agg})
    _, kept = evict(policy, cache_view(budget, layer_view(attention, n_head_kv)))
    for row, slots in zip(expected, kept[0], strict=True):
        chosen = np.sort(reference.topk_idx(row, budget - window))
        assert slots.tolist() == [*chosen, *range(n - window, n)]


@pytest.mark.parametrize("seed", range(60))
def test_ada_counts_and_rounding(seed):
    rng = np.random.default_rng(seed)
    n_head, n = int(rng.integers(1, 7)), int(rng.integers(1, 60))
    budget = int(rng.integers(0, n + 1))
    scores = rng.random((n_head, n)) ** rng.uniform(0.5, 6, (n_head, 1))
    counts = top_counts(scores, n_head * budget)
    assert counts.tolist() == reference.ada_counts(scores, budget).tolist()
    for alpha in (0, 0.25, 0.5, 1):  # exact in binary, so that equal fractions are equal in both
        exact = reference.ada_budget_exact(scores, budget, alpha)
        assert mix(counts, np.full(n_head, budget), alpha).tolist() == exact.tolist()
    for alpha in (0, 0.2, 0.29, 0.5, 0.9, 1):
        official = reference.ada_budget_official(scores, budget, alpha)
        assert mix_adakv(counts, budget, alpha).tolist() == official.tolist()
        mixed = mix(counts, np.full(n_head, budget), alpha)
        assert mass(scores, mixed) >= mass(scores, np.full(n_head, budget)) - 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_protect_and_kvpress_selection(seed, alpha):
    rng = np.random.default_rng(seed)
    q, k, n_head_kv, window, n, budget = draw_model(rng)
    attention = reference.window_attention(q, k, window).mean(axis=1)
    args = {"window": window, "kernel": 3, "pool": "avg", "alpha": alpha}
    scores = reference.snap_scores(q, k, window, 3, "avgpool")
    view = cache_view(budget, layer_view(attention, n_head_kv))

    expected = reference.ada_protect(scores, n_head_kv * (budget - window), int((budget - window) * alpha))
    _, kept = evict(make_policy("ada-snapkv", {**args, "safeguard": "protect"}), view)
    for slots, chosen in zip(kept[0], expected, strict=True):
        assert slots.tolist() == [*chosen, *range(n - window, n)]

    padded = np.pad(scores, ((0, 0), (0, window)), constant_values=scores.max() + 1)
    expected = reference.ada_protect(padded, n_head_kv * budget, int(budget * alpha))
    _, kept = evict(make_policy("ada-snapkv", {**args, "compat": "kvpress"}), view)
    assert [s.tolist() for s in kept[0]] == [s.tolist() for s in expected]


@pytest.mark.parametrize("seed", range(50))
def test_pyramids_of_the_repositories(seed):
    rng = np.random.default_rng(seed)
    n_layer, window, beta = int(rng.integers(2, 81)), int(rng.integers(1, 65)), int(rng.integers(1, 30))
    n = 1 << int(rng.integers(8, 14))
    budget = int(rng.integers(window + 1, n - 1))
    integer = reference.pyramid(budget, window, beta, n_layer, n)
    assert pyramid_adakv(budget - window, beta, n_layer, n - window).tolist() == integer
    rounded = reference.pyramid_kvpress(1 - budget / n, window, beta, n_layer, n)
    assert pyramid_kvpress(budget, beta, n_layer, n, window).tolist() == rounded
