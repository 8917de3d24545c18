"""Keeps the sequences of a context within their budget: when to evict and to demote, and that it happens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.evict import evict, guided_scores, size
from kvlocal.engine.report import RSS, rss_bytes
from kvlocal.native import library
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import PAGE_SLOTS


class Keeper:
    """What policy, budget and storage mean for the sequences of one context.

    Attributes:
        evict_s: seconds spent so far.
        rss: resident memory around the first eviction.
        rolled: per sequence, tokens read minus the next position: what renumbering took away.
    """

    def __init__(self, context: Context, config: EngineConfig, n_ctx: int) -> None:
        self.context = context
        self.config = config
        self.n_ctx = n_ctx
        self.reset()

    def reset(self) -> None:
        """Forget what was measured, and renumbering: the sequences are empty."""
        self.evict_s = 0.0
        self.rss = RSS()
        self.rolled = [0] * self.config.n_seq_max

    @property
    def cache(self) -> PagedCache | None:
        return self.context.cache

    @property
    def bounded(self) -> bool:
        return self.config.policy.evicts and not self.config.budget.keeps_all

    @property
    def chunk_room(self) -> int:
        """Tokens per head that a sequence may hold before the next chunk of a chunked prompt."""
        return self.n_ctx - self.config.chunk - self.config.guide

    def n_seen(self, seq: int) -> int:
        return self.context.n_seen(seq) + self.rolled[seq]

    def budget_tokens(self, seq: int = 0) -> int:
        """The budget of a sequence now, tokens per head and layer on average."""
        if self.cache is None or not self.bounded:
            return self.n_seen(seq)
        return self.config.storage.tokens(self.config.budget, self.n_seen(seq), self.cache, self.config.policy)

    def held(self, seq: int, n_seen: int) -> int:
        """What the policy counts per head, rounded up (:func:`size`); ``n_seen`` over the stock cache."""
        return math.ceil(size(self.cache, seq, self.config.policy)) if self.cache is not None else n_seen

    def evicted_at(self, seq: int) -> int:
        """Of the tokens read before this one some may be missing."""
        return self.cache.evicted_at(seq) + self.rolled[seq] if self.cache is not None else 0

    def on_event(self, seq: int, event: int) -> None:
        """The evict hook: see ``kvl.h``."""
        # what comes next must find room in the cache, whatever the budget allows
        rooms = {library.EVENT_CHUNK: self.chunk_room, library.EVENT_LIMIT: self.n_ctx - self.config.evict_every}
        # a step while decoding never waits for more than one page of each head
        self.evict(seq, room=rooms.get(event), n_pages=int(event == library.EVENT_LIMIT))

    def evict(self, seq: int = 0, *, room: int | None = None, guide: Sequence[int] = (), n_pages: int = 0) -> bool:
        """Bring a sequence down to its budget, or to ``room`` tokens per head if that is less, and demote what is due.

        ``guide``: tokens whose attention decides, as if they came next; they are not kept. ``n_pages``: most pages per
        head that the storage demotes, 0: all that are due.

        Returns:
            ``False`` if it already holds no more.
        """
        if self.cache is None:
            return False
        start = time.perf_counter()
        evicted = self.bounded and self._evict(self.cache, seq, room, guide)
        demoted = self.config.storage.store(self.cache, seq, self.config.policy.n_window, n_pages)
        self.cache.set_limit(seq, self._limit(self.cache, seq))
        if evicted or demoted:
            self.evict_s += time.perf_counter() - start
        return evicted

    def watch(self, seq: int) -> None:
        """Call the hook again where it is due: after a change of policy or budget, or a restored sequence."""
        if self.cache is not None:
            self.cache.set_limit(seq, self._limit(self.cache, seq))

    def set_limit(self, seq: int, n_slots: int) -> None:
        """Tokens per head past which the hook is called, 0: never."""
        if self.cache is not None:
            self.cache.set_limit(seq, n_slots)

    def _limit(self, cache: PagedCache, seq: int) -> int:
        """Tokens per head at which a growing sequence is looked at again, 0: never."""
        policy, storage, every = self.config.policy, self.config.storage, self.config.evict_every
        if self.bounded and policy.formats:
            left = int(policy.limit(self.budget_tokens(seq), every) - size(cache, seq, policy))
            return cache.mean_slots(seq) + max(left, every - 1)
        limit = self.n_ctx - 1
        if self.bounded:
            limit = min(limit, policy.limit(self.budget_tokens(seq), every))
        if storage.demotes:
            limit = min(limit, cache.mean_slots(seq) + min(every, PAGE_SLOTS) - 1)
        return limit if self.bounded or storage.demotes else 0

    def _evict(self, cache: PagedCache, seq: int, room: int | None, guide: Sequence[int]) -> bool:
        policy = self.config.policy
        budget = self.budget_tokens(seq)
        if room is not None:
            budget = min(budget, max(room, policy.min_budget))
        rss = rss_bytes()
        how = policy.n_window, policy.rms
        read_scores = partial(guided_scores, self.context, seq, guide, *how) if guide else None
        n_seen = self.context.n_seen(seq)
        if not evict(cache, seq, policy, budget, read_scores, self.n_ctx):
            return False
        self.rolled[seq] += n_seen - self.context.n_seen(seq)
        if self.rss.before_evict_bytes is None:
            self.rss.before_evict_bytes, self.rss.after_evict_bytes = rss, rss_bytes()
        return True
