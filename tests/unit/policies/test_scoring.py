"""Who competes, group reduction, pooling, top-k."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import layer_view, random_layer

from kvlocal.errors import KVError
from kvlocal.policies.parts.scoring import pool, prefix_scores, reduce_groups, region, top

GROUP = np.array([[0.60, 0.10, 0.25, 0.05], [0.02, 0.38, 0.35, 0.25]])
GROUP_6 = np.array([[0.50, 0.10, 0.10, 0.05, 0.20, 0.05], [0.05, 0.05, 0.40, 0.30, 0.10, 0.10]])


def naive_pool(row: np.ndarray, kernel: int, kind: str) -> list[float]:
    half = kernel // 2
    near = [row[max(0, i - half) : i + half + 1] for i in range(len(row))]
    return [r.sum() / kernel if kind == "avg" else r.max() for r in near]


def snap_example() -> np.ndarray:
    """Window scores of one head with keys ln(a), unit queries, window 2: ``[1, 8]``."""
    a = np.array([1, 4, 1, 1, 2, 1, 2, 4.0])
    rows = [np.r_[a[:7] / a[:7].sum(), 0], a / a.sum()]
    assert a[:7].sum() == 12 and a.sum() == 16
    return np.mean(rows, axis=0)[None]


def test_snapkv_scores_of_the_worked_example():
    scores = snap_example()[:, :6]
    np.testing.assert_allclose(scores[0], np.array([1, 4, 1, 1, 2, 1]) * 7 / 96)
    np.testing.assert_allclose(pool(scores, 3, "avg")[0], np.array([5, 6, 6, 4, 4, 3]) * 7 / 288)
    np.testing.assert_allclose(pool(scores, 3, "max")[0], np.array([4, 4, 4, 2, 2, 2]) * 7 / 96)


@pytest.mark.parametrize(
    ("kind", "k", "expected"),
    [("none", 2, [1, 4]), ("avg", 2, [1, 2]), ("avg", 3, [0, 1, 2]), ("max", 3, [0, 1, 2])],
)
def test_snapkv_selection_of_the_worked_example(kind, k, expected):
    assert top(pool(snap_example()[:, :6], 3, kind)[0], k).tolist() == expected


@pytest.mark.parametrize(
    ("agg", "reduced", "kept"), [("mean", [0.31, 0.24, 0.30, 0.15], [0, 2]), ("max", [0.60, 0.38, 0.35, 0.25], [0, 1])]
)
def test_group_reduction_of_the_worked_example(agg, reduced, kept):
    scores = reduce_groups(GROUP, 1, agg)
    np.testing.assert_allclose(scores, [reduced])
    assert top(scores[0], 2).tolist() == kept


def test_order_of_reduction_and_max_pooling():
    view = layer_view(np.c_[GROUP_6, [9.0, 9.0]], n_head_kv=1)
    where = region(view, sink=0, window=1)
    pool_last = prefix_scores(view, where, kernel=3, kind="max", agg="mean")[0, :6]
    np.testing.assert_allclose(pool_last, [0.275, 0.275, 0.25, 0.25, 0.175, 0.15])
    assert top(pool_last, 2).tolist() == [0, 1]
    pool_first = prefix_scores(view, where, kernel=3, kind="max", agg="mean", pool_first=True)[0, :6]
    np.testing.assert_allclose(pool_first, [0.275, 0.45, 0.25, 0.30, 0.25, 0.15])
    assert top(pool_first, 2).tolist() == [1, 3]


def test_order_of_reduction_and_avg_pooling_does_not_matter():
    view = layer_view(np.c_[GROUP_6, [9.0, 9.0]], n_head_kv=1)
    where = region(view, sink=0, window=1)
    both = [prefix_scores(view, where, kernel=3, kind="avg", agg="mean", pool_first=f)[0, :6] for f in (False, True)]
    np.testing.assert_allclose(*both)


def test_mean_of_the_group_keeps_most_of_the_mass():
    """No other pair holds more of the group's attention; the max over the group picks a worse one."""
    best = max(GROUP[:, [i, j]].sum() for i in range(4) for j in range(i))
    assert GROUP[:, top(reduce_groups(GROUP, 1, "mean")[0], 2)].sum() == pytest.approx(best)
    assert GROUP[:, top(reduce_groups(GROUP, 1, "max")[0], 2)].sum() < best


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 20),
    st.sampled_from([1, 3, 7, 31]),
    st.sampled_from(["avg", "max", "none"]),
)
@settings(max_examples=60, deadline=None)
def test_pool_matches_the_definition(seed, n, kernel, kind):
    scores = np.random.default_rng(seed).normal(size=(2, n))
    expected = scores if kind == "none" else [naive_pool(row, kernel, kind) for row in scores]
    np.testing.assert_allclose(pool(scores, kernel, kind), expected, atol=1e-12)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.25, 0.5, -np.inf, 1.0]), max_size=30), st.data())
@settings(max_examples=150, deadline=None)
def test_top_is_a_stable_sort(values, data):
    k = data.draw(st.integers(0, len(values)))
    expected = sorted(np.argsort(-np.array(values), kind="stable")[:k].tolist())
    assert top(np.array(values), k).tolist() == expected


def test_top_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="3 largest of 2"):
        top(np.ones(2), 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 6), st.integers(1, 12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_region_follows_positions(seed, n_seen, sink, window, ragged):
    view = random_layer(np.random.default_rng(seed), 3, 1, n_seen, ragged=ragged)
    where = region(view, sink, window)
    for h, p in enumerate(view.positions):
        recent = p >= n_seen - window
        assert where.stop[h] == np.count_nonzero(~recent)
        assert where.start[h] == np.count_nonzero((p < sink) & ~recent)
        assert where.always[h] + where.size[h] == len(p) and where.always[h] >= 1


def test_a_head_without_sink_and_window_keeps_its_newest_slot():
    view = layer_view(np.ones((2, 3)), positions=[np.array([5, 6, 7]), np.array([7, 28, 29])], n_seen=30)
    where = region(view, sink=2, window=4)
    assert where.start.tolist() == [0, 0]
    assert where.stop.tolist() == [2, 1]


def test_window_lends_no_score_and_sinks_do():
    view = layer_view(np.array([[5.0, 0, 0, 1, 0, 0, 8.0]]))
    scores = prefix_scores(view, region(view, sink=1, window=1), kernel=3, kind="max", agg="mean")
    assert scores.tolist() == [[-np.inf, 5, 1, 1, 1, 0, -np.inf]]
    scores = prefix_scores(view, region(view, sink=1, window=1), kernel=3, kind="avg", agg="mean")
    np.testing.assert_allclose(scores, [[-np.inf, 5 / 3, 1 / 3, 1 / 3, 1 / 3, 0, -np.inf]])


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["max", "avg", "none"]))
@settings(max_examples=60, deadline=None)
def test_ragged_heads_do_not_see_each_other(seed, pool_first, kind):
    """Every head scores as if it were alone in a layer without padding."""
    view = random_layer(np.random.default_rng(seed), 3, 2, 30, window=3)
    options = {"kernel": 5, "kind": kind, "agg": "mean", "pool_first": pool_first}
    together = prefix_scores(view, region(view, 2, 3), **options)
    for h, p in enumerate(view.positions):
        alone = layer_view(view.scores[2 * h : 2 * h + 2, : len(p)], 1, [p], 30)
        expected = prefix_scores(alone, region(alone, 2, 3), **options)[0]
        assert together[h, : len(p)].tolist() == expected.tolist()
        assert (together[h, len(p) :] == -np.inf).all()


def test_unusable_scores_are_named():
    with pytest.raises(KVError, match=r"layer 3.*NaN"):
        view = layer_view(np.array([[0.1, np.nan, 0.2]]), layer=3)
        prefix_scores(view, region(view, 0, 1), kernel=1, kind="none", agg="mean")
    with pytest.raises(KVError, match=r"shape \(1, 2\), not \(1, 3\)"):
        view = layer_view(np.ones((1, 2)), positions=[np.arange(3)])
        prefix_scores(view, region(view, 0, 1), kernel=1, kind="none", agg="mean")
