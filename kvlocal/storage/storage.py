"""How kept tokens are stored: which stay in f16, and the format that the others are demoted to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlocal.errors import UsageError
from kvlocal.native.cache import Layer, PagedCache
from kvlocal.native.formats import BITS, PAGE_SLOTS
from kvlocal.policies.parts.policy import Policy
from kvlocal.setting import refusal
from kvlocal.settings import KV_TAIL
from kvlocal.storage.budget import Budget, format_bytes
from kvlocal.storage.schedule import all_but_ends, all_but_log

STORAGES = ("f16", "q8", "q4", "kv3", "kv2", "kivi", "logquant")
"""Names that ``--kv`` takes."""

MIN_MEAN = 64
"""Tokens from which the mean of the keys is taken, at least."""

SINK = 32
"""Tokens at the start that stay in f16 by default; kivi and logquant keep none, as published."""


@dataclass(frozen=True)
class Storage:
    """Which tokens stay in f16, and the format that the others are demoted to, once.

    ``q8``, ``q4``, ``kv3``, ``kv2``: rotated rows of 8, 4, 3 and 2, or 2 bits; tokens that leave the tail are
    demoted, sinks never. ``kivi`` (Liu et al., arXiv:2402.02750): keys per channel over groups of tokens, values
    per token over groups of channels; whole groups of tokens that have left the tail are demoted. ``logquant`` (Chen et
    al., arXiv:2503.19950): likewise, but what stays in f16 is :func:`log_positions`, which thins out with age.

    Attributes:
        name: one of :data:`STORAGES`; ``f16`` demotes nothing.
        sink: tokens at the start of the sequence that stay in f16 (default: :data:`SINK`, of kivi and logquant 0).
        tail: latest tokens that stay in f16; for logquant an upper limit on all that do.
        centre: subtract a head's mean key before demotion to q4, kv3 and kv2; attention adds it back exactly. The mean
            is taken once, over the tokens between sinks and tail, when the first :data:`MIN_MEAN` of them are demoted.
        bits: of kivi and logquant, 2 or 4; group: of these, 32 or 64 tokens (keys) or channels (values).
        quantizer: of logquant: ``channel`` is kivi's, ``token`` groups 64 channels of one token, of keys too, with an
            integer zero point, as its authors' code does.
    """

    name: str = "f16"
    sink: int = -1
    tail: int = KV_TAIL.default
    centre: bool = True
    bits: int = 2
    group: int = 32
    quantizer: str = "channel"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in STORAGES:
            raise UsageError(f"There is no storage {self.name!r} for the KV cache; give {', '.join(STORAGES)}.")
        if self.sink == -1:
            object.__setattr__(self, "sink", 0 if self._published else SINK)
        for what in ("sink", "tail"):
            if not KV_TAIL.accepts(getattr(self, what)):
                raise refusal(f"The {what} of the storage", getattr(self, what), KV_TAIL.allowed)
        if self.name == "logquant" and self.tail < 3:
            raise UsageError(f"The tail of logquant is {self.tail}; it must be 3 or more (three windows).")
        for what, allowed in (("bits", (2, 4)), ("group", (32, 64)), ("quantizer", ("channel", "token"))):
            if getattr(self, what) not in allowed:
                choices = " or ".join(map(str, allowed))
                raise UsageError(f"{what} is {getattr(self, what)!r} for the storage {self.name}; give {choices}.")

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> Storage:
        """Reads ``name`` or ``name:key=value:…``, such as ``kivi:bits=4:group=64``.

        Raises:
            UsageError: an unknown storage or key, or a value that is not allowed.
        """
        name, *settings = text.strip().split(":")
        plain = cls(name)
        known = ["sink", "tail"]
        known += ["centre"] if plain.rotates else []
        known += ["bits", "group"] if plain._published else []
        known += ["quantizer"] if name == "logquant" else []
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in known:
                raise UsageError(f"Storage {name!r} has no setting {key!r}; it has {', '.join(known)}.")
            try:
                values[key] = value if key == "quantizer" else int(value)
            except ValueError:
                setting = setting if len(setting) < 100 else f"{setting[:40]}…"
                raise UsageError(f"{setting} is not possible for the storage {name}: give a whole number.") from None
        if "centre" in values:
            values["centre"] = bool(values["centre"])
        return cls(name, **(defaults | values))

    @property
    def _published(self) -> bool:
        return self.name in ("kivi", "logquant")

    @property
    def demotes(self) -> bool:
        return self.name != "f16"

    @property
    def format(self) -> str:
        """The format of demoted slots, one of :data:`kvlocal.native.formats.FORMATS`."""
        if self.name == "logquant" and self.quantizer == "token":
            return "token2"
        return "kivi" if self._published else self.name

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that a context needs for it, beside f16."""
        return (self.format,) if self.demotes else ()

    @property
    def rotates(self) -> bool:
        """Whether a context must rotate keys and values for it: blocks of a row then hold values of one size."""
        return self.demotes and not self._published

    @property
    def _centres(self) -> bool:
        return self.centre and self.rotates and self.name != "q8"

    def slot_bytes(self, layer: Layer) -> float:
        """K and V bytes of one demoted slot of one head."""
        k, v = (self.bits + 32 / self.group,) * 2 if self.format == "kivi" else BITS[self.format]
        return (layer.d_k * k + layer.d_v * v) / 8

    def bytes_per_token(self, cache: PagedCache) -> int:
        """K and V bytes of one demoted token in every head of every layer, rounded up."""
        return math.ceil(sum(layer.n_head_kv * self.slot_bytes(layer) for layer in cache.layers))

    def tokens(self, budget: Budget, n_seen: int, cache: PagedCache, policy: Policy) -> int:
        """Tokens per KV head and open layer that a budget allows.

        From a budget in bytes are subtracted first: what sliding windows and a recurrent state take; the f16 bytes of
        sinks and tail.

        Raises:
            UsageError: as :meth:`Budget.tokens`; bytes that what comes first alone would take.
        """
        if budget.unit == "bytes" and cache.fixed_bytes:
            fixed = f"sliding windows and recurrent states of this model take {format_bytes(cache.fixed_bytes)} of it"
            if int(budget.value) <= cache.fixed_bytes:
                raise UsageError(f"A budget of {budget} is too small: {fixed}, which no policy changes.")
            try:
                return self._tokens(Budget("bytes", int(budget.value) - cache.fixed_bytes), n_seen, cache, policy)
            except UsageError as error:
                raise UsageError(f"Of a budget of {budget}, {fixed}. {error}") from None
        return self._tokens(budget, n_seen, cache, policy)

    def _tokens(self, budget: Budget, n_seen: int, cache: PagedCache, policy: Policy) -> int:
        if policy.formats:  # it counts pages itself
            return budget.tokens(n_seen, cache.bytes_per_token, policy.min_budget, page_slots=1)
        each, more = self.bytes_per_token(cache), cache.bytes_per_token - self.bytes_per_token(cache)
        if budget.unit == "bytes" and self.demotes:
            # sinks, tail, what waits for its group and what is in neither full page are f16
            waits = self.group if self.format == "kivi" else 0
            f16_bytes = (self.sink + self.tail + waits + PAGE_SLOTS) * more
            if int(budget.value) <= f16_bytes:
                raise UsageError(
                    f"A budget of {budget} is too small: sinks and tail of the storage {self.name} alone take "
                    f"{f16_bytes / 2**20:.1f} MiB; use a larger budget or a shorter --kv-tail."
                )
            budget = Budget("bytes", int(budget.value) - f16_bytes)
            return budget.tokens(n_seen, each, policy.min_budget, page_slots=2 * PAGE_SLOTS)
        return budget.tokens(n_seen, each, policy.min_budget)

    def check(self, budget: Budget, cache: PagedCache, policy: Policy, n_ctx: int, memory_bytes: int | None) -> None:
        """Refuses an impossible budget, as :meth:`Budget.check` does, with the bytes that this storage takes; and a
        policy that renumbers what cannot be renumbered."""
        if policy.rolls and cache.fixed_bytes:
            raise UsageError(
                f"The policy {policy.name} with these arguments renumbers the tokens that it keeps, which a model with "
                "sliding windows or recurrent layers cannot bear; leave out positions=rolled."
            )
        self.tokens(budget, n_ctx, cache, policy)
        budget.check(policy.min_budget, n_ctx, self.bytes_per_token(cache), memory_bytes)

    def due(self, n_seen: int, n_window: int) -> np.ndarray:
        """Positions to demote once ``n_seen`` tokens were seen, int32, ascending.

        The latest ``n_window`` are never among them: their queries rank the others.
        """
        if self.name == "logquant":
            return all_but_log(n_seen, self.sink, self.tail, n_window)
        return all_but_ends(n_seen, self.sink, max(self.tail, n_window))

    def store(self, cache: PagedCache, seq: int, n_window: int, n_pages: int = 0) -> bool:
        """Demote the tokens that are due.

        Args:
            cache: the cache.
            seq: the sequence.
            n_window: latest tokens that stay as they are.
            n_pages: most pages (of kivi groups) per head that are demoted now, 0: all.

        Returns:
            Whether a token was demoted.
        """
        if not self.demotes:
            return False
        positions = self.due(int(cache.seq_stats(seq).n_seen), n_window)
        if not len(positions):
            return False
        first, end, some = int(positions[0]), int(positions[-1]) + 1, False
        for layer in range(len(cache.layers)):
            if self._centres and cache.centre(seq, layer, first, end, MIN_MEAN) < MIN_MEAN:
                continue
            most = n_pages * max(PAGE_SLOTS, self.group if self.format == "kivi" else 0)
            some |= cache.demote_due(seq, layer, positions, self.format, most) > 0
        return some
