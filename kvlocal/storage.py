"""How kept tokens are stored: which of them in f16, and what the others are demoted to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvlocal.budget import PAGE_SLOTS, Budget
from kvlocal.cache import PagedCache
from kvlocal.errors import UsageError

MIN_MEAN = 64
"""Tokens from which the mean of the keys is taken, at least."""

BITS = {"f16": (16.0, 16.0), "q8": (8.5, 8.5), "q4": (4.5, 4.5), "kv3": (3.25, 2.25), "kv2": (2.25, 2.25)}
"""Per value of K and of V, scales included."""

STORAGES = tuple(BITS)
"""Formats that this rule can fill, slot by slot."""


@dataclass(frozen=True)
class Storage:
    """Tokens that leave the tail are demoted to ``name``, the sinks never; the values of pages stay as they are then.

    Attributes:
        name: one of :data:`STORAGES`; ``f16`` demotes nothing.
        sink: tokens at the start of the sequence that stay in f16; tail: latest tokens that do.
        centre: take the mean of a head's keys away before they are demoted (but to q8, which does not need it).
            Attention gives it back exactly; it is taken once, from the tokens between sinks and tail, when the first
            :data:`MIN_MEAN` of them are demoted.
    """

    name: str = "f16"
    sink: int = 32
    tail: int = 128
    centre: bool = True

    def __post_init__(self) -> None:
        if self.name not in STORAGES:
            raise UsageError(f"There is no storage {self.name!r} for the KV cache; give {', '.join(STORAGES)}.")
        for what in ("sink", "tail"):
            if getattr(self, what) < 0:
                raise UsageError(f"The {what} of the storage is {getattr(self, what)}; it must be 0 or more.")

    @property
    def demotes(self) -> bool:
        return self.name != "f16"

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that a context needs for it, beside f16."""
        return (self.name,) if self.demotes else ()

    def bytes_per_token(self, cache: PagedCache) -> int:
        """K and V bytes of one demoted token in every head of every layer, rounded up."""
        k, v = BITS[self.name]
        return math.ceil(sum(layer.n_head_kv * (layer.d_k * k + layer.d_v * v) for layer in cache.layers) / 8)

    def tokens(self, budget: Budget, n_seen: int, cache: PagedCache, min_budget: int) -> int:
        """Tokens per KV head and layer that a budget allows; of bytes, those that sinks and tail take come first."""
        each, more = self.bytes_per_token(cache), cache.bytes_per_token - self.bytes_per_token(cache)
        if budget.unit == "bytes" and self.demotes:
            # sinks, tail and what is in neither full page are f16
            budget = Budget("bytes", max(int(budget.value) - (self.sink + self.tail + PAGE_SLOTS) * more, 0))
            return budget.tokens(n_seen, each, min_budget, page_slots=2 * PAGE_SLOTS)
        return budget.tokens(n_seen, each, min_budget)

    def check(self, budget: Budget, cache: PagedCache, min_budget: int, n_ctx: int, memory_bytes: int) -> None:
        """Refuses a budget that cannot be, as :meth:`Budget.check` does, with what this storage needs."""
        self.tokens(budget, n_ctx, cache, min_budget)
        budget.check(min_budget, n_ctx, self.bytes_per_token(cache), memory_bytes)

    def store(self, cache: PagedCache, seq: int, n_window: int) -> bool:
        """Demote what has left the tail, which is never shorter than the ``n_window`` queries that score.

        Returns:
            Whether there was anything to demote.
        """
        end = int(cache.seq_stats(seq).n_seen) - max(self.tail, n_window)
        if not self.demotes or end <= self.sink:
            return False
        some = False
        for layer in range(len(cache.layers)):
            positions = cache.positions(seq, layer)
            slots = [np.arange(*np.searchsorted(p, (self.sink, end))) for p in positions]
            if self.centre and self.name != "q8" and not cache.has_mu(seq, layer):
                if max(map(len, slots)) < MIN_MEAN:
                    continue
                keys = [cache.keys_values(seq, layer, h)[0][chosen] for h, chosen in enumerate(slots)]
                cache.set_mu(seq, layer, np.array([k.mean(axis=0) if len(k) else np.zeros(k.shape[1]) for k in keys]))
            cache.demote(seq, layer, slots, self.name)
            some = True
        return some
