"""One eviction: a policy looks at a sequence and the cache keeps what it says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

from kvlocal.cache import PagedCache
from kvlocal.context import Context
from kvlocal.policies.base import Policy


@functools.cache
def _pools() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded."""
    return ThreadpoolController()


def evict(
    cache: PagedCache,
    seq: int,
    policy: Policy,
    budget: int,
    read_scores: Callable[[], Sequence[np.ndarray]] | None = None,
) -> bool:
    """Bring a sequence down to ``budget`` tokens per KV head and layer, on average.

    Args:
        cache: the cache.
        seq: the sequence.
        policy: says what stays.
        budget: tokens per KV head and layer.
        read_scores: called if something is evicted: window scores per layer, float32 ``[n_head, >= longest head]``, in
            place of those of the sequence's own last queries; see :func:`guided_scores`.

    Returns:
        ``False`` if the policy sees no need, and nothing was done.
    """
    stats = cache.seq_stats(seq)
    if not policy.due(stats.n_slots / stats.n_heads, budget):
        return False
    scores = read_scores() if read_scores else None
    view = cache.view(seq, budget, policy.n_window)
    if scores is not None:
        for layer, given in zip(view.layers, scores, strict=True):
            layer.read_scores = lambda given=given: given  # type: ignore[misc]
    # a policy's matrices are small, and threads of numpy's would wait for those of llama.cpp, which spin for a while
    with _pools().limit(limits=1, user_api="blas"):
        budgets = policy.allocate(view)
        for layer, counts in zip(view.layers, budgets, strict=True):
            cache.keep(seq, layer.layer, policy.keep(layer, counts))
            layer.release()
    if policy.rolls:
        cache.roll(seq)
    cache.note_eviction(seq)
    cache.trim()
    return True


def guided_scores(context: Context, seq: int, guide: Sequence[int], n_window: int) -> list[np.ndarray]:
    """Window scores as they would be if ``guide`` came next: it is decoded, its attention read, and taken back.

    ``n_window``: how many of its last queries look.

    Returns:
        Per layer float32 ``[n_head, longest head]``; the attention that goes to the guide itself is cut off.
    """
    cache = context.cache
    assert cache is not None
    n = context.n_seen(seq)
    lengths = [int(heads.max()) for heads in cache.held(seq)]
    try:
        context.decode(guide, n, seq, outputs="none")
        return [cache.window_scores(seq, layer, n_window)[:, :longest] for layer, longest in enumerate(lengths)]
    finally:
        context.truncate(seq, n)
