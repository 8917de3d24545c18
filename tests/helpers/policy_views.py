"""Views of a cache that exists only in numpy, for the tests of the policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvlocal.policies import CacheView, LayerView, Policy


def layer_view(
    scores: np.ndarray,
    n_head_kv: int | None = None,
    positions: Sequence[np.ndarray] | None = None,
    n_seen: int | None = None,
    layer: int = 0,
) -> LayerView:
    """A layer with the given window scores (and masses) ``[n_head, n]``, random keys and up to 16 random queries.

    Positions default to ``0 .. n - 1`` in every head.
    """
    scores = np.asarray(scores)
    n_head, n = scores.shape
    n_head_kv = n_head_kv or n_head
    if positions is None:
        positions = [np.arange(n, dtype=np.int32)] * n_head_kv
    if n_seen is None:
        n_seen = 1 + max(int(p[-1]) for p in positions)
    rng = np.random.default_rng(layer)
    keys = [rng.standard_normal((len(p), 4)).astype(np.float32) for p in positions]
    n_window = min(n_seen, 16)
    queries = rng.standard_normal((n_window, n_head, 4)).astype(np.float32)
    return LayerView(
        layer,
        n_head,
        n_head_kv,
        positions,
        n_seen,
        lambda: scores,
        n_window,
        read_mass=lambda: scores,
        read_kv=lambda h: (keys[h], keys[h]),
        read_queries=lambda: queries,
        rotate=rotate,
        kq_scale=0.5,
    )


def rotate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE over neighbouring pairs of values, with base 10000; a last odd value is not turned."""
    d = rows.shape[1] // 2 * 2
    angles = np.asarray(positions)[:, None] * 10000.0 ** -(np.arange(0, d, 2) / d)
    turned = (rows[:, 0:d:2] + 1j * rows[:, 1:d:2]) * np.exp(1j * angles)
    out = np.array(rows, np.float32)
    out[:, 0:d:2], out[:, 1:d:2] = turned.real, turned.imag
    return out


def cache_view(budget: int, *layers: LayerView) -> CacheView:
    return CacheView(layers, budget)


def evict(policy: Policy, view: CacheView) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """What the engine does: allocate once, then keep per layer. Returns (budgets, kept slots per layer and head)."""
    budgets = policy.allocate(view)
    return budgets, [policy.keep(layer, row) for layer, row in zip(view.layers, budgets, strict=True)]


def with_window(prefix_scores: Sequence[Sequence[float]], window: int) -> np.ndarray:
    """Appends ``window`` columns; their scores must not matter, so they are large."""
    prefix = np.asarray(prefix_scores, dtype=np.float64)
    return np.hstack([prefix, np.full((len(prefix), window), 9.0)])


def mass(scores: np.ndarray, counts: np.ndarray) -> float:
    """Sum over heads of the ``counts[h]`` largest scores."""
    return float(sum(np.sort(row)[::-1][:k].sum() for row, k in zip(scores, counts, strict=True)))


def random_layer(
    rng: np.random.Generator,
    n_head_kv: int,
    group: int,
    n_seen: int,
    *,
    ragged: bool = True,
    ties: bool = False,
    window: int = 0,
    layer: int = 0,
) -> LayerView:
    """A layer that has seen ``n_seen`` tokens; ragged heads each lost a random part, never the last ``window``."""
    held = []
    for _ in range(n_head_kv):
        lost = (rng.random(n_seen) < rng.uniform(0, 0.7)) & ragged
        lost[n_seen - max(window, 1) :] = False
        held.append(np.flatnonzero(~lost).astype(np.int32))
    n = max(len(p) for p in held)
    scores = rng.integers(0, 4, (n_head_kv * group, n)) / 4 if ties else rng.random((n_head_kv * group, n))
    scores = scores.astype(np.float32)
    for h, p in enumerate(held):
        scores[h * group : (h + 1) * group, len(p) :] = 0
    return layer_view(scores, n_head_kv, held, n_seen, layer)
