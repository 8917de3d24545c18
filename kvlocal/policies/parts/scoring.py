"""From window attention to one score per slot: who competes, group reduction, pooling, top-k.

``H`` KV heads, ``n_head`` query heads, ``n`` the most slots that any head holds. Heads may be ragged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KVError
from kvlocal.policies.parts.view import LayerView

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Region:
    """Per head, slots ``[start, stop)`` compete; those before are sinks, those after are the window.

    Attributes:
        start: int64 ``[H]``.
        stop: int64 ``[H]``.
        held: int64 ``[H]``: all slots of the head.
    """

    start: Ints
    stop: Ints
    held: Ints

    @property
    def size(self) -> Ints:
        """Slots that compete, int64 ``[H]``."""
        return self.stop - self.start

    @property
    def always(self) -> Ints:
        """Slots that are kept whatever their score, int64 ``[H]``."""
        return self.held - self.size


def region(layer: LayerView, sink: int, window: int) -> Region:
    """Splits the slots of every head by position: below ``sink``, from ``n_seen - window`` on, and the rest.

    A head can have lost both ends (its tail was removed from the sequence); its newest slot is then kept as a
    window of one, so that no head is ever emptied.
    """
    held = layer.n_slots
    first = layer.n_seen - window
    stop = np.array([np.searchsorted(p, first) for p in layer.positions], dtype=np.int64)
    start = np.array([np.searchsorted(p, sink) for p in layer.positions], dtype=np.int64)
    start = np.minimum(start, stop)
    stop -= (start == 0) & (stop == held) & (held > 0)
    return Region(start, stop, held)


def reduce_groups(scores: Floats, n_head_kv: int, agg: str) -> Floats:
    """Query heads to KV heads, ``[n_head, n] -> [H, n]``: mean or max over the group that shares a KV head.

    The mean picks the set that maximises the group's summed attention mass; the max does not.
    """
    grouped = scores.reshape(n_head_kv, -1, scores.shape[-1])
    return grouped.mean(axis=1) if agg == "mean" else grouped.max(axis=1)


def pool(scores: Floats, kernel: int, kind: str) -> Floats:
    """1-D pooling along the slots, stride 1, same length: neighbours of an important slot are kept with it.

    ``avg`` pads with zeros and always divides by ``kernel`` (both ends are damped); ``max`` pads with -inf.
    """
    if kind == "none" or kernel == 1:
        return scores
    half, n = kernel // 2, scores.shape[-1]
    padded = np.pad(scores, ((0, 0), (half, half)), constant_values=0 if kind == "avg" else -np.inf)
    if kind == "max":
        # the maximum of two overlapping runs is that of both: widths double until two of them cover the kernel
        width = 1
        while 2 * width <= kernel:
            padded = np.maximum(padded[:, :-width], padded[:, width:])
            width *= 2
        rest = kernel - width
        return np.maximum(padded[:, :n], padded[:, rest : rest + n])
    pooled: Floats = padded[:, :n].copy()
    for shift in range(1, kernel):
        pooled += padded[:, shift : shift + n]
    pooled /= kernel
    return pooled


def prefix_scores(
    layer: LayerView, where: Region, *, kernel: int, kind: str, agg: str, pool_first: bool = False
) -> Floats:
    """Scores of the competing slots, ``[H, n]``, -inf everywhere else.

    Window slots neither compete nor lend their score to neighbours; sinks do not compete but do lend.
    ``pool_first`` pools each query head before reducing the group (a different result only for ``max``).
    """
    scores = _checked_scores(layer)
    columns = np.arange(scores.shape[1])
    if not pool_first:
        scores = reduce_groups(scores, layer.n_head_kv, agg)
    beyond = columns >= np.repeat(where.stop, len(scores) // layer.n_head_kv)[:, None]
    scores = pool(np.where(beyond, scores.dtype.type(0 if kind == "avg" else -np.inf), scores), kernel, kind)
    if pool_first:
        scores = reduce_groups(scores, layer.n_head_kv, agg)
    return competing(scores, where)


def competing(scores: Floats, where: Region) -> Floats:
    """``scores`` ``[H, n]`` with -inf where a slot does not compete."""
    columns = np.arange(scores.shape[1])
    competes = (columns >= where.start[:, None]) & (columns < where.stop[:, None])
    return np.where(competes, scores, scores.dtype.type(-np.inf))


def per_head(layer: LayerView, score: Callable[[int], Floats]) -> Floats:
    """``score(h)`` ``[n_slots[h]]`` of every KV head as one array ``[H, n]``, zero beyond a head's length."""
    out = np.zeros((layer.n_head_kv, int(layer.n_slots.max(initial=0))))
    for h, n in enumerate(layer.n_slots):
        out[h, :n] = score(h)
    return out


def top(values: Floats, k: int) -> Ints:
    """Indices of the ``k`` largest entries of a vector, ascending; equal values: the lower index first."""
    n = len(values)
    if not 0 <= k <= n:
        raise ValueError(f"cannot take the {k} largest of {n} values")
    if k == 0:
        return np.empty(0, dtype=np.int64)
    cut = np.partition(values, n - k)[n - k]
    chosen = values > cut
    chosen[np.flatnonzero(values == cut)[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen).astype(np.int64)


def _checked_scores(layer: LayerView) -> Floats:
    scores = np.asarray(layer.scores)
    n = int(layer.n_slots.max(initial=0))
    if scores.ndim != 2 or scores.shape[0] != layer.n_head or scores.shape[1] < n:
        raise KVError(f"layer {layer.layer}: window scores have shape {scores.shape}, not ({layer.n_head}, {n}).")
    if not np.isfinite(scores).all():
        raise KVError(f"layer {layer.layer}: the window scores contain NaN or infinity, so nothing can be ranked.")
    return scores[:, :n]
