"""Worked examples of SentenceKV and its neighbours: which prompt tokens stay, what means keep of rotated keys, what a
step reads."""

from __future__ import annotations

import math

import numpy as np
import retrieval_reference as reference
from policy_views import cache_view, layer_view

from kvlocal.policies import make_policy

W = np.array([8, 1, 1, 1, 1, 4, 2, 2], float)
KEYS = np.array([(1, 0), (3, 0), (2, 3), (0, 4), (1, 1), (1, -1), (0, 1), (1, 0)], float)


def window_scores(weights: np.ndarray, n_window: int) -> np.ndarray:
    """Mean over the window's rows of the softmax of log weights, causal; ``[1, n]``."""
    n = len(weights)
    rows = [np.where(np.arange(n) <= i, weights, 0) / weights[: i + 1].sum() for i in range(n - n_window, n)]
    return np.mean(rows, axis=0)[None, :]


def kept(weights: np.ndarray, budget: int, **args: object) -> list[int]:
    policy = make_policy("sentencekv", {"window": 2, **args})
    return next(policy.decide(cache_view(budget, layer_view(window_scores(weights, 2))))).keep[0].tolist()


def test_which_prompt_tokens_stay() -> None:
    """U2: two window rows, pooling of width 3, r tau = 6; without pooling ties go to the lower slot."""
    np.testing.assert_allclose(2 * window_scores(W, 2)[0, :6], [38 / 45, *[19 / 180] * 4, 19 / 45])
    assert kept(W, 6, kernel=3) == [0, 1, 4, 5, 6, 7]
    assert kept(W, 6, pool="none") == [0, 1, 2, 5, 6, 7]


def test_every_head_keeps_its_own() -> None:
    """U2b: the second head of the example; two of its prompt tokens."""
    weights = np.array([1, 1, 1, 8, 1, 1, 2, 2], float)
    np.testing.assert_allclose(2 * window_scores(weights, 2)[0, 3], 8 / 15 + 8 / 17)
    assert kept(weights, 4, pool="none") == [0, 3, 6, 7]
    assert kept(W, 4, pool="none") == [0, 5, 6, 7]


def attend(slots: list[int]) -> float:
    """Attention of the query (0, 2) over some slots, whose values are their numbers."""
    logits = KEYS[slots] @ np.array([0, 2.0]) / math.sqrt(2)
    p = np.exp(logits - logits.max())
    return float(p @ np.array(slots, float) / p.sum())


def test_what_a_part_changes() -> None:
    """U4c: exact softmax over what is read, no correction for what is not."""
    assert round(attend(list(range(8))), 6) == 2.853931
    assert round(attend([0, 1, 3, 6, 7]), 6) == 3.038655


def rope(x: np.ndarray, position: float) -> np.ndarray:
    """Pairs (i, i + d/2), base 10000."""
    half = len(x) // 2
    angle = position * 10000.0 ** -(np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def test_a_mean_of_rotated_keys_turns_as_they_do() -> None:
    """U8: renumbering by -7 turns the mean."""
    keys = np.array([(1, 2, 0, 1), (0, 1, 1, 0), (2, 0, 1, 1)], float)
    mean = reference.mean_key(np.array([rope(k, p) for k, p in zip(keys, (10, 11, 12), strict=True)]))
    np.testing.assert_allclose(mean, [0.795067, 0.921473, -0.256296, 0.765753], atol=1e-6)
    shifted = reference.mean_key(np.array([rope(k, p) for k, p in zip(keys, (3, 4, 5), strict=True)]))
    np.testing.assert_allclose(shifted, [0.431020, 0.972775, -0.715570, 0.699427], atol=1e-6)
    np.testing.assert_allclose(rope(mean, -7), shifted)
    query = np.array([1.0, 0, 1, 0])
    assert round(float(rope(query, 20) @ mean), 6) == round(float(rope(query, 13) @ shifted), 6) == -0.739974


def test_rotated_storage_changes_no_score() -> None:
    """U9: an orthonormal Hadamard matrix on query and mean."""
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    query, mean = np.array([1.0, 2, 3, 4]), np.array([0.5, -1, 2, 0.25])
    assert abs((hadamard @ query) @ (hadamard @ mean) - query @ mean) < 1e-14


def test_a_long_mean_loses_fast_pairs() -> None:
    """U9b: a constant key at positions 0 to 3, norms of its two pairs."""
    mean = reference.mean_key(np.array([rope(np.array([1.0, 1, 0, 0]), p) for p in range(4)]))
    norms = np.hypot(mean[:2], mean[2:])
    np.testing.assert_allclose(norms, [0.474160, 0.999938], atol=1e-6)
    angle = 1 / 2 * np.array([1, 0.01])
    np.testing.assert_allclose(norms, np.abs(np.sin(4 * angle) / (4 * np.sin(angle))), atol=1e-6)


def test_whole_units_do_not_exceed_what_clusters_would() -> None:
    """U12: ClusterKV takes clusters until there are enough, seven tokens for five, and cuts; whole units that fit do
    not exceed five."""
    assert reference.choose([1, 2, 0], [3, 4, 2], 5, 1) == ([1], None)
    assert reference.choose([1, 2, 0], [3, 4, 2], 5, 1, partial=True) == ([1], (0, 1))
