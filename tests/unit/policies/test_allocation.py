"""Dividing budgets: worked examples of the specification, and what must hold for every input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import mass

from kvlocal.policies.parts.allocation import (
    largest_remainder,
    mix,
    pyramid,
    safe_counts,
    spread,
    top_counts,
)
from kvlocal.policies.parts.compat import mix_adakv, pyramid_adakv, pyramid_kvpress

# Three heads x six tokens, the figure in the Ada-KV README; two tokens per head.
THREE = np.array(
    [
        [0.32, 0.01, 0.18, 0.08, 0.22, 0.19],
        [0.89, 0.01, 0.05, 0.02, 0.01, 0.02],
        [0.68, 0.01, 0.08, 0.04, 0.09, 0.10],
    ]
)
TWO = np.array([[0.90, 0.03, 0.02, 0.01, 0.02, 0.02], [0.20, 0.18, 0.17, 0.16, 0.15, 0.14]])

SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.one_of(st.sampled_from([0.0, 0.2, 0.29, 0.5, 1.0]), st.floats(0, 1))


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def draw_scores(seed: int, n_head: int, n: int, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (n_head, n)) / 4 if ties else rng.random((n_head, n)) ** 3


LAYERS = st.builds(draw_scores, SEEDS, st.integers(1, 5), st.integers(1, 24), st.booleans())


def test_adaptive_counts_of_the_readme_figure():
    counts = top_counts(THREE, 6)
    assert counts.tolist() == [4, 1, 1]
    assert mass(THREE, ints(2, 2, 2)) == pytest.approx(2.26)
    assert mass(THREE, counts) == pytest.approx(2.48)
    assert 2 * (3 - mass(THREE, counts)) == pytest.approx(1.04)
    assert 2 * (3 - mass(THREE, ints(2, 2, 2))) == pytest.approx(1.48)


@pytest.mark.parametrize(
    ("alpha", "exact", "upstream"),
    [(0.2, [4, 1, 1], [3, 1, 1]), (0.5, [3, 2, 1], [3, 2, 2]), (1, [2, 2, 2], [2, 2, 2])],
)
def test_safeguard_of_the_readme_figure(alpha, exact, upstream):
    counts = top_counts(THREE, 6)
    assert mix(counts, ints(2, 2, 2), alpha).tolist() == exact
    assert mix_adakv(counts, 2, alpha).tolist() == upstream


def test_mass_after_rounding():
    assert mass(THREE, mix(ints(4, 1, 1), ints(2, 2, 2), 0.5)) == pytest.approx(2.35)
    assert mass(THREE, mix_adakv(ints(4, 1, 1), 2, 0.2)) == pytest.approx(2.30)


@pytest.mark.parametrize(("n_safe", "expected"), [(1, [4, 1, 1]), (2, [2, 2, 2])])
def test_protected_counts_of_the_readme_figure(n_safe, expected):
    assert top_counts(THREE, 6, ints(n_safe, n_safe, n_safe)).tolist() == expected


def test_two_heads():
    counts = top_counts(TWO, 6)
    assert counts.tolist() == [1, 5]
    assert mass(TWO, ints(3, 3)) == pytest.approx(1.50)
    assert mass(TWO, counts) == pytest.approx(1.76)
    assert mix(counts, ints(3, 3), 0.2).tolist() == [1, 5]
    assert mix_adakv(counts, 3, 0.2).tolist() == [1, 4]
    assert mass(TWO, ints(1, 4)) == pytest.approx(1.61)


def test_concentrated_heads_win_under_weights():
    scores = np.array([[0.40, 0.20, 0.15, 0.10, 0.10, 0.05], [0.18, 0.17, 0.17, 0.16, 0.16, 0.16]])
    assert top_counts(scores, 6).tolist() == [2, 4]
    assert top_counts(scores * [[0.75], [0.52]], 6).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("counts", "budget", "alpha", "exact", "upstream"),
    [
        ([24, 5, 1], 10, 0.2, [21, 6, 3], [21, 6, 3]),
        ([9, 1], 5, 0.5, [7, 3], [6, 2]),
        ([8, 1, 0], 3, 0.5, [6, 2, 1], [5, 2, 1]),
    ],
)
def test_rounding_examples(counts, budget, alpha, exact, upstream):
    assert mix(ints(*counts), np.full(len(counts), budget), alpha).tolist() == exact
    assert mix_adakv(ints(*counts), budget, alpha).tolist() == upstream


def test_identical_heads_share_equally():
    assert top_counts(np.full((2, 4), 0.25), 4).tolist() == [2, 2]


def test_equal_fractions_go_to_the_lower_index():
    assert largest_remainder(np.array([1.5, 1.5, 1.0]), 4).tolist() == [2, 1, 1]
    # 0.2 * 3 and 0.6 differ in the last bit, and that must not decide.
    assert largest_remainder(np.array([0.6, 0.2 * 3, 0.8]), 2).tolist() == [1, 0, 1]


def test_reserved_share_is_not_lost_to_binary_fractions():
    assert safe_counts(ints(100, 7), 0.29).tolist() == [29, 2]


def test_pyramid_examples():
    assert pyramid(16, 4, 4, 196).tolist() == [28, 20, 12, 4]
    assert pyramid(16, 4, 4, 27).tolist() == [27, 20, 12, 5]
    assert pyramid_adakv(16, 4, 4, 196).tolist() == [28, 20, 12, 4]
    assert pyramid_adakv(16, 4, 4, 27).tolist() == [27, 20, 13, 6]


def test_pyramid_of_the_repository_overshoots_as_specified():
    upstream = pyramid_adakv(64 - 8, 20, 80, 7992)
    assert upstream.sum() / (80 * 56) - 1 == pytest.approx(0.259, abs=5e-4)
    assert pyramid(64 - 8, 20, 80, 7992).sum() == 80 * 56


@pytest.mark.parametrize(("budget", "n_tokens"), [(256, 1024), (1024, 4096), (1024, 8192)])
def test_kvpress_pyramid_falls_back_to_equal_layers(budget, n_tokens):
    assert (pyramid_kvpress(budget, 20, 32, n_tokens, 64) == budget).all()


def test_kvpress_pyramid_is_a_pyramid_where_the_window_fits():
    layers = pyramid_kvpress(2048, 20, 32, 8192, 64)
    assert layers[0] == 3994 and layers[-1] == 102
    assert abs(layers.sum() - 32 * 2048) <= 16


@given(LAYERS, st.data())
@settings(max_examples=150, deadline=None)
def test_counts_follow_the_tie_rule(scores, data):
    n_head, n = scores.shape
    total = data.draw(st.integers(0, scores.size))
    ranked = np.sort(scores, axis=1)[:, ::-1]
    order = sorted((-ranked[h, rank], rank, h) for h in range(n_head) for rank in range(n))
    expected = np.bincount([h for _, _, h in order[:total]], minlength=n_head)
    assert top_counts(scores, total).tolist() == expected.tolist()


@given(LAYERS, ALPHAS, st.data())
@settings(max_examples=150, deadline=None)
def test_mix_keeps_the_total_and_stays_between(scores, alpha, data):
    n_head, n = scores.shape
    budget = data.draw(st.integers(0, n))
    uniform = np.full(n_head, budget)
    adaptive = top_counts(scores, n_head * budget)
    mixed = mix(adaptive, uniform, alpha)
    assert mixed.sum() == n_head * budget
    assert (np.minimum(adaptive, uniform) <= mixed).all() and (mixed <= np.maximum(adaptive, uniform)).all()
    assert (np.abs(mixed - ((1 - alpha) * adaptive + alpha * uniform)) < 1 + 1e-6).all()


@given(LAYERS, ALPHAS, st.data())
@settings(max_examples=150, deadline=None)
def test_protect_reserves_and_keeps_the_total(scores, alpha, data):
    n_head, n = scores.shape
    budget = data.draw(st.integers(0, n))
    reserved = safe_counts(np.full(n_head, budget), alpha)
    counts = top_counts(scores, n_head * budget, reserved)
    assert counts.sum() == n_head * budget
    assert (counts >= reserved).all() and (counts <= n).all()


@given(LAYERS, st.data())
@settings(max_examples=60, deadline=None)
def test_extremes_of_alpha_and_a_single_head(scores, data):
    n_head, n = scores.shape
    budget = data.draw(st.integers(0, n))
    uniform = np.full(n_head, budget)
    adaptive = top_counts(scores, n_head * budget)
    assert mix(adaptive, uniform, 1.0).tolist() == uniform.tolist()
    assert top_counts(scores, n_head * budget, safe_counts(uniform, 1.0)).tolist() == uniform.tolist()
    assert mix(adaptive, uniform, 0.0).tolist() == adaptive.tolist()
    assert top_counts(scores[:1], budget).tolist() == [budget]


@given(SEEDS, st.integers(1, 5), st.integers(1, 24), ALPHAS, st.data())
@settings(max_examples=100, deadline=None)
def test_permuting_heads_permutes_counts(seed, n_head, n, alpha, data):
    scores = draw_scores(seed, n_head, n, ties=False)
    order = data.draw(st.permutations(range(n_head)))
    budget = data.draw(st.integers(0, n))
    uniform = np.full(n_head, budget)
    adaptive = top_counts(scores, n_head * budget)
    assert top_counts(scores[order], n_head * budget).tolist() == adaptive[order].tolist()
    reserved = safe_counts(uniform, alpha)
    protected = top_counts(scores, n_head * budget, reserved)
    assert top_counts(scores[order], n_head * budget, reserved).tolist() == protected[order].tolist()
    fractions = np.round(((1 - alpha) * adaptive + alpha * uniform) % 1, 9) % 1
    if len(set(fractions[fractions > 0])) == np.count_nonzero(fractions):
        assert mix(adaptive[order], uniform, alpha).tolist() == mix(adaptive, uniform, alpha)[order].tolist()


@given(LAYERS, st.sampled_from([2.0**-20, 0.5, 4.0]), st.data())
@settings(max_examples=60, deadline=None)
def test_scaling_all_scores_changes_nothing(scores, factor, data):
    total = data.draw(st.integers(0, scores.size))
    assert top_counts(scores * factor, total).tolist() == top_counts(scores, total).tolist()


@given(st.integers(0, 4000), st.integers(1, 64), st.integers(1, 80), st.integers(0, 9000))
@settings(max_examples=300, deadline=None)
def test_pyramid_is_exact_and_never_increases(budget, beta, n_layer, n_prefix):
    layers = pyramid(budget, beta, n_layer, n_prefix)
    assert len(layers) == n_layer
    assert layers.sum() == n_layer * min(budget, n_prefix)
    assert (np.diff(layers) <= 0).all()
    assert layers.min() >= 0 and layers.max() <= n_prefix


@given(st.integers(0, 4000), st.integers(1, 80), st.integers(0, 9000))
@settings(max_examples=60, deadline=None)
def test_pyramid_with_beta_one_is_uniform(budget, n_layer, n_prefix):
    assert set(pyramid(budget, 1, n_layer, n_prefix)) == {min(budget, n_prefix)}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_spread_is_exact_capped_and_even(pairs, data):
    start, caps = np.array(pairs, dtype=np.int64).T
    total = data.draw(st.integers(int(np.minimum(start, caps).sum()), int(caps.sum())))
    counts = spread(total, caps, start)
    assert counts.sum() == total
    assert (counts <= caps).all() and (counts >= np.minimum(start, caps)).all()
    raised = (counts - start)[counts < caps]
    if len(raised):
        assert raised.max() - raised.min() <= 1
        assert (np.diff(raised) <= 0).all()
        assert (counts - start).max() <= raised.max() + 1


@pytest.mark.parametrize("total", [-1, 11])
def test_spread_refuses_what_does_not_fit(total):
    with pytest.raises(ValueError, match="cannot spread"):
        spread(total, ints(5, 5))
