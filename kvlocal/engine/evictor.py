"""The only place that decides when sequences are evicted and demoted, and how far; what is left is then chosen from."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from kvlocal.engine.report import RSS, rss_bytes
from kvlocal.engine.retrieving import Retrieving
from kvlocal.engine.sequence import Sequence, append
from kvlocal.engine.view import cache_view
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import PAGE_SLOTS
from kvlocal.native.retrieval import Retrieved
from kvlocal.policies.parts.policy import Policy
from kvlocal.retrieval.retriever import Retriever
from kvlocal.storage.archive import Archive
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

Event = Literal["prompt", "chunk", "step"]
"""What was decoded: the end of a prompt, a chunk of one, a token of an answer."""


@dataclass(frozen=True)
class Bounds:
    """What holds a sequence within its memory.

    Attributes:
        policy: which tokens stay; budget: how many; storage: how those are stored.
        retriever: which of those a token reads, ``None``: all.
        archive: what keeps the others on disk, ``None``: nothing; in units of the retriever, if there is none of
            :data:`~kvlocal.retrieval.registry.UNITS`.
        n_ctx: tokens per head that the cache has room for.
        evict_every: tokens per head that a growing sequence goes over its budget until it is evicted again.
    """

    policy: Policy
    budget: Budget
    storage: Storage = field(default_factory=Storage)
    n_ctx: int = 2**31 - 1
    evict_every: int = 32
    retriever: Retriever | None = None
    archive: Archive | None = None

    @property
    def evicts(self) -> bool:
        return self.policy.evicts and not self.budget.keeps_all

    def growth(self, budget: int) -> int:
        """Tokens per head by which a sequence within this budget grows until it is looked at again."""
        return self.policy.limit(budget, self.evict_every) + 1 - budget


class Evictor:
    """Keeps sequences of a context within their bounds.

    Attributes:
        evict_s: seconds spent on evictions and demotions so far.
        retrieving: what chooses the tokens that are read, and keeps an archive; ``None``: all are, and nothing does.
        rss: resident memory around the first eviction.
    """

    def __init__(self, context: Context, bounds: Bounds) -> None:
        self.context = context
        self.bounds = bounds
        reads = bounds.retriever or bounds.archive
        self.retrieving = Retrieving(context, bounds.retriever, bounds.archive) if reads else None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        if self.retrieving:
            self.retrieving.reset()
        self.evict_s = 0.0
        self.rss = RSS()

    @property
    def evicts(self) -> bool:
        """Whether anything is ever evicted."""
        return self.context.cache is not None and self.bounds.evicts

    def budget_tokens(self, sequence: Sequence) -> int:
        """The budget of a sequence now, tokens per head and layer on average."""
        if self.context.cache is None or not self.evicts:
            return len(sequence.tokens)
        bounds = self.bounds
        return bounds.storage.tokens(bounds.budget, len(sequence.tokens), self.context.cache, bounds.policy)

    def held(self, sequence: Sequence) -> int:
        """What the policy counts per head, rounded up (:func:`size`); all tokens over the stock cache."""
        cache = self.context.cache
        return len(sequence.tokens) if cache is None else math.ceil(size(cache, sequence.seq, self.bounds.policy))

    def after(self, sequence: Sequence, event: Event, *, room: int | None = None, guide: Iterable[int] = ()) -> bool:
        """Evict and demote what is due now that tokens of a sequence were decoded, and choose what the next one reads.

        Args:
            sequence: which one.
            event: what was decoded. After a ``step`` nothing is done before ``sequence.look_at`` tokens, and no more
                than one page of each head is demoted, so that no step waits long.
            room: tokens per head that may stay at most, whatever the budget allows.
            guide: tokens whose attention decides, as if they came next; they are not kept.

        Returns:
            Whether something was evicted.

        Raises:
            KVError: it failed. The tokens are in the cache, and ``sequence.evicted_at`` says what may be missing.
        """
        cache = self.context.cache
        if cache is None:
            return False
        due = event != "step" or (sequence.look_at is not None and len(sequence.tokens) > sequence.look_at)
        evicted = due and self._shrink(cache, sequence, event, room, guide)
        if event != "chunk":
            self.choose(sequence)
        return evicted

    def recall(self, sequence: Sequence, begin: int) -> bool:
        """A question was read, the tokens from ``begin`` on: what it asks for comes back from the archive, and it is
        read once more. ``False``: nothing did."""
        return self.retrieving is not None and self.retrieving.recall(sequence, begin)

    @property
    def archives(self) -> bool:
        """Whether what is evicted or demoted lies on disk."""
        return self.bounds.archive is not None

    def adopt(self, sequence: Sequence, path: Path, tag: str, table: np.ndarray) -> None:
        """Take the saved archive of a sequence that was loaded.

        Raises:
            KVError: it cannot be read, or is another one's.
        """
        assert self.retrieving is not None
        self.retrieving.adopt(sequence, path, tag, table)

    def reports(self, sequence: Sequence) -> dict[str, Any]:
        """What a report says of what is read and of the archive, by the names of its fields."""
        if self.retrieving is None:
            return {}
        return {"reads": self.retrieving.report(), "archive": self.retrieving.archive_report(sequence)}

    def choose(self, sequence: Sequence) -> Retrieved | None:
        """Choose what the next token reads; ``None``: all, always."""
        return self.retrieving.choose(sequence) if self.retrieving else None

    def _shrink(
        self, cache: PagedCache, sequence: Sequence, event: Event, room: int | None, guide: Iterable[int]
    ) -> bool:
        step = event == "step"
        start = time.perf_counter()
        if self.bounds.storage.demotes:
            self._note_keys(sequence)
        evicted = self.evicts and self._evict(cache, sequence, room, list(guide), step=step)
        n_pages = int(step)
        demoted = self.bounds.storage.store(cache, sequence.seq, self.bounds.policy.n_window, n_pages)
        self.watch(sequence)
        if evicted or demoted:
            self.evict_s += time.perf_counter() - start
        return evicted

    def _note_keys(self, sequence: Sequence) -> None:
        """Take up, and write to the archive, what may be lost now."""
        if self.retrieving:
            self.retrieving.index(sequence)

    def watch(self, sequence: Sequence) -> None:
        """Set when a sequence is looked at next: after an eviction, a change of bounds, or when it was loaded."""
        cache = self.context.cache
        sequence.look_at = None if cache is None else self._look_at(cache, sequence)

    def _look_at(self, cache: PagedCache, sequence: Sequence) -> int | None:
        bounds, policy, every = self.bounds, self.bounds.policy, self.bounds.evict_every
        if not (self.evicts or bounds.storage.demotes):
            return None
        n = len(sequence.tokens)
        if self.evicts and policy.formats:
            # it counts bytes: of the f16 tokens that may come, not of those that are there
            held = math.ceil(size(cache, sequence.seq, policy))
            left = max(policy.limit(self._target(sequence), every) - held, every - 1)
            return n + min(left, max(bounds.n_ctx + PAGE_SLOTS - 1 - held, 0))
        limit, held = bounds.n_ctx - 1, cache.mean_slots(sequence.seq)
        if self.evicts:
            limit = min(limit, policy.limit(self.budget_tokens(sequence), every))
        if bounds.storage.demotes:
            limit = min(limit, held + min(every, PAGE_SLOTS) - 1)
        return n + limit - held

    def _target(self, sequence: Sequence) -> int:
        """The budget, or what leaves room in the cache until the next look if that is less."""
        bounds = self.bounds
        budget = self.budget_tokens(sequence)
        room = bounds.n_ctx - bounds.growth(min(budget, bounds.n_ctx))
        return min(budget, max(room, bounds.policy.min_budget))

    def _evict(self, cache: PagedCache, sequence: Sequence, room: int | None, guide: list[int], *, step: bool) -> bool:
        bounds, policy = self.bounds, self.bounds.policy
        budget = self._target(sequence) if step else self.budget_tokens(sequence)
        if room is not None:
            budget = min(budget, max(room, policy.min_budget))
        n_free = bounds.growth(min(budget, bounds.n_ctx)) if room is None else bounds.n_ctx - room
        rss = rss_bytes()
        read = (lambda: guided_scores(sequence, guide, rms=policy.rms)) if guide else None
        first = functools.partial(self._note_keys, sequence)
        if not evict(sequence, policy, budget, read, n_room=bounds.n_ctx, n_free=n_free, first=first):
            return False
        if self.rss.before_evict_bytes is None:
            self.rss.before_evict_bytes, self.rss.after_evict_bytes = rss, rss_bytes()
        return True


def size(cache: PagedCache, seq: int, policy: Policy) -> float:
    """What a sequence holds, as its policy counts: tokens per KV head and layer on average, or f16 tokens that take as
    many bytes as its pages."""
    stats = cache.seq_stats(seq)
    if policy.formats:
        return float(stats.page_bytes / cache.bytes_per_token)
    return float(stats.n_slots / stats.n_heads)


def evict(
    sequence: Sequence,
    policy: Policy,
    budget: int,
    read_scores: Callable[[], list[np.ndarray]] | None = None,
    *,
    n_room: int = 0,
    n_free: int = 0,
    first: Callable[[], None] | None = None,
) -> bool:
    """One eviction: a policy looks at a sequence and the cache keeps what it says.

    The sequence notes the eviction before the first layer changes: one that fails half way leaves a sequence that
    knows what it no longer has.

    Args:
        sequence: of a context with a paged cache.
        policy: says what stays.
        budget: tokens per KV head and layer, on average.
        read_scores: called if something is evicted: window scores per layer, float32 ``[n_head, >= longest head]``, in
            place of those of the sequence's own last queries; see :func:`guided_scores`.
        n_room: slots that a head has room for, 0: any number; n_free: of these, f16 slots that must stay free.
        first: called before something is evicted.

    Returns:
        ``False`` if the policy sees no need, and nothing was done.
    """
    cache, seq = sequence.context.cache, sequence.seq
    assert cache is not None
    if not policy.due(size(cache, seq, policy), budget):
        return False
    if first is not None:
        first()
    scores = read_scores() if read_scores else None
    view = cache_view(sequence, policy, budget, n_room=n_room, n_free=n_free)
    if scores is not None:
        for layer, given in zip(view.layers, scores, strict=True):
            layer.read_scores = lambda given=given: given  # type: ignore[misc]
    # a policy's matrices are small, and threads of numpy's would wait for those of llama.cpp, which spin for a while
    with _pools().limit(limits=1, user_api="blas"):
        for layer, decision in zip(view.layers, policy.decide(view), strict=True):
            sequence.evicted_at = len(sequence.tokens)
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
        sequence.rolled = len(sequence.tokens) - sequence.context.n_seen(seq)
    cache.trim()
    return True


@functools.cache
def _pools() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded."""
    return ThreadpoolController()


def guided_scores(sequence: Sequence, guide: list[int], *, rms: bool = False) -> list[np.ndarray]:
    """Window scores as they would be if ``guide`` came next: it is decoded, its attention read, and taken back.

    All queries of the guide look, and no others, as far as the context remembers so many; ``rms``: as the policy's.

    Returns:
        Per layer float32 ``[n_head, longest head]``; the attention that goes to the guide itself is cut off.
    """
    cache, seq = sequence.context.cache, sequence.seq
    assert cache is not None
    n, position = len(sequence.tokens), sequence.position
    lengths = [int(heads.max()) for heads in cache.held(seq)]
    n_queries = min(len(guide), sequence.context.config.n_window)
    sequence.mark(logits=False)
    try:
        append({sequence: guide}, outputs="none")
        return [cache.window_scores(seq, layer, n_queries, rms)[:, :longest] for layer, longest in enumerate(lengths)]
    finally:
        if sequence.tokens:
            sequence.context.truncate(seq, position)
            sequence.forget_after(n)


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
