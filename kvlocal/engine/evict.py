"""One eviction: a policy looks at a sequence and the cache keeps what it says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from threadpoolctl import ThreadpoolController

from kvlocal.engine.view import cache_view
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.policies.parts.policy import Policy


@functools.cache
def _pools() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded."""
    return ThreadpoolController()


def size(cache: PagedCache, seq: int, policy: Policy) -> float:
    """What a sequence holds, as its policy counts: tokens per KV head and layer on average, or f16 tokens that take as
    many bytes as its pages."""
    stats = cache.seq_stats(seq)
    if policy.formats:
        return float(stats.page_bytes / cache.bytes_per_token)
    return float(stats.n_slots / stats.n_heads)


def evict(
    cache: PagedCache,
    seq: int,
    policy: Policy,
    budget: int,
    read_scores: Callable[[], Sequence[np.ndarray]] | None = None,
    n_room: int = 0,
) -> bool:
    """Bring a sequence down to ``budget`` tokens per KV head and layer, on average.

    Args:
        cache: the cache.
        seq: the sequence.
        policy: says what stays.
        budget: tokens per KV head and layer.
        read_scores: called if something is evicted: window scores per layer, float32 ``[n_head, >= longest head]``, in
            place of those of the sequence's own last queries; see :func:`guided_scores`.
        n_room: slots that a head has room for, 0: any number.

    Returns:
        ``False`` if the policy sees no need, and nothing was done.
    """
    if not policy.due(size(cache, seq, policy), budget):
        return False
    scores = read_scores() if read_scores else None
    view = cache_view(cache, seq, budget, policy.n_window, n_room, policy.rms)
    if scores is not None:
        for layer, given in zip(view.layers, scores, strict=True):
            layer.read_scores = lambda given=given: given  # type: ignore[misc]
    # a policy's matrices are small, and threads of numpy's would wait for those of llama.cpp, which spin for a while
    with _pools().limit(limits=1, user_api="blas"):
        for layer, decision in zip(view.layers, policy.decide(view), strict=True):
            if any(len(slots) for heads in decision.demote.values() for slots in heads):
                cache.centre(seq, layer.layer, *decision.centre)
            keep = decision.keep
            if "kivi" in cache.formats:
                keep = [whole_groups(*of) for of in zip(keep, cache.kivi_groups(seq, layer.layer), strict=True)]
            cache.keep(seq, layer.layer, keep)
            for name, slots in decision.demote.items():
                cache.demote(seq, layer.layer, slots, name)
    if policy.rolls:
        cache.roll(seq)
    cache.note_eviction(seq)
    cache.trim()
    return True


def whole_groups(keep: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What a head keeps when slots that share scales can only go together.

    Of the groups in which something is to be kept those with the most of it stay, as a whole: as many of them as the
    slots to be kept would fill, at least one if there is nothing else. Equally many: the newer group. Nothing is
    encoded anew, so values do not drift, and every group that goes gives its bytes back.

    Args:
        keep: slots that a policy keeps, ascending.
        groups: int32 ``[n_slots]``: the group of every slot, -1: on its own.

    Returns:
        Slots to keep, ascending, in all at most as many as ``keep`` and the rest of one group.
    """
    of_kept = groups[keep]
    alone = keep[of_kept < 0]
    counts = np.bincount(of_kept[of_kept >= 0], minlength=int(groups.max(initial=-1)) + 1)
    sizes = np.bincount(groups[groups >= 0], minlength=len(counts))
    order = np.lexsort((-np.arange(len(counts)), -counts))
    fits = np.cumsum(sizes[order]) <= counts.sum()
    if not len(alone) and not fits.any():
        fits[:1] = True
    stay = np.isin(groups, order[fits])
    stay[alone] = True
    return np.flatnonzero(stay)


def guided_scores(
    context: Context, seq: int, guide: Sequence[int], n_window: int, rms: bool = False
) -> list[np.ndarray]:
    """Window scores as they would be if ``guide`` came next: it is decoded, its attention read, and taken back.

    ``n_window``: how many of its last queries look; ``rms``: as the policy's.

    Returns:
        Per layer float32 ``[n_head, longest head]``; the attention that goes to the guide itself is cut off.
    """
    cache = context.cache
    assert cache is not None
    n = context.n_seen(seq)
    lengths = [int(heads.max()) for heads in cache.held(seq)]
    try:
        context.decode(guide, n, seq, outputs="none")
        return [cache.window_scores(seq, layer, n_window, rms)[:, :longest] for layer, longest in enumerate(lengths)]
    finally:
        context.truncate(seq, n)
