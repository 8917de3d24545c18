"""How much the cache may hold: ``1024`` (tokens), ``25%`` (of what was seen), ``512MiB`` (bytes)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from kvlocal.errors import UsageError
from kvlocal.native.formats import PAGE_SLOTS
from kvlocal.setting import MAX_INT

MAX_BYTES = 2**63 - 1
_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_UNITS = {name.lower(): size for name, size in (_DECIMAL | _BINARY).items()}
_PATTERN = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[a-z]*)", re.IGNORECASE)
_HELP = "give tokens per head (1024), a share of the tokens seen (25%) or bytes (512MiB, 1GiB, 300MB)"


@dataclass(frozen=True)
class Budget:
    """An upper limit on the cache of one sequence.

    Attributes:
        unit: ``tokens`` per KV head and layer on average, window and sinks included; ``percent`` of the tokens that
            the sequence has seen; or ``bytes`` of K and V.
        value: a positive number in that unit; whole except for percent.
    """

    unit: Literal["tokens", "percent", "bytes"]
    value: int | Decimal

    def __post_init__(self) -> None:
        if self.value < 0:
            raise UsageError(f"A budget of {self} is negative: {_HELP}.")
        if self.value == 0:
            raise UsageError(f"A budget of {self} keeps nothing: {_HELP}.")
        most = {"tokens": MAX_INT, "bytes": MAX_BYTES}.get(self.unit)
        if most is not None and self.value > most:
            raise UsageError(f"A budget of {self.value} {self.unit} is more than there can be: at most {most}.")
        if self.unit == "percent" and self.value > 100:
            raise UsageError(f"A budget of {self} is more than everything: 100% already keeps all tokens.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads a budget as written on the command line; units in any case, decimals for percent and bytes.

        Raises:
            UsageError: not a budget, zero, negative, or more than 100 %.
        """
        match = _PATTERN.fullmatch(text.strip()) if len(text) < 100 else None
        if match is None:
            shown = text if len(text) < 100 else f"{text[:40]}…"
            raise UsageError(f"{shown!r} is not a budget: {_HELP}.")
        sign, digits, unit = match.groups()
        number = Decimal(sign + digits)
        if unit == "%":
            return cls("percent", number)
        if unit.lower() in _UNITS:
            return cls("bytes", int(Fraction(number) * _UNITS[unit.lower()]))
        if unit:
            raise UsageError(f"{unit!r} in {text!r} is not a unit: use %, {', '.join(_DECIMAL | _BINARY)}.")
        if number != int(number):
            raise UsageError(f"{text!r} is not a whole number of tokens: {_HELP}.")
        return cls("tokens", int(number))

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{self.value:f}%"
        if self.unit == "tokens":
            return str(self.value)
        for name, size in _BINARY.items():
            if self.value != 0 and self.value % size == 0:
                return f"{int(self.value) // size}{name}"
        return f"{self.value}B"

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever evicted under this budget, however long the sequence gets."""
        return self.unit == "percent" and self.value == 100

    def tokens(self, n_seen: int, bytes_per_token: int, min_budget: int = 1, *, page_slots: int = PAGE_SLOTS) -> int:
        """Tokens per KV head and layer, on average, that this budget allows now.

        Bytes count whole pages. A head with ``n`` slots takes ``ceil(n / page_slots)`` pages, so at worst every head
        wastes ``page_slots - 1`` slots, however the policy divides the budget over heads. These are subtracted: the
        pages of the kept slots never exceed the bytes. (Rounding down to whole pages would be enough only for
        policies that give every head the same.) Slots appended after the eviction are the caller's to account for.

        Args:
            n_seen: tokens that the sequence has seen.
            bytes_per_token: K and V bytes of one token held in every head of every layer.
            min_budget: the policy's minimum. A percentage is raised to it silently (a share of a short prompt must
                work); an explicit number of tokens or bytes below it is an error.

        Raises:
            UsageError: tokens or bytes that allow less than ``min_budget``.
        """
        if self.unit == "percent":
            return max(int(Fraction(self.value) * n_seen / 100), min_budget, 1)
        if self.unit == "tokens":
            if self.value < min_budget:
                raise UsageError(
                    f"A budget of {self} tokens per head is too small: the policy needs at least {min_budget}."
                )
            return int(self.value)
        n = int(self.value) // bytes_per_token - (page_slots - 1)
        if n < max(min_budget, 1):
            needed = (max(min_budget, 1) + page_slots - 1) * bytes_per_token
            raise UsageError(
                f"A budget of {self} is too small: the policy needs at least {min_budget} tokens per head, "
                f"which take {format_bytes(needed)} with this model and storage."
            )
        return n

    def check(self, min_budget: int, n_ctx: int, bytes_per_token: int, memory_bytes: int | None) -> None:
        """Refuses what can be seen to be impossible before the model runs.

        Args:
            min_budget: the policy's minimum, in tokens per head.
            n_ctx: the most tokens that a sequence can reach.
            bytes_per_token: as in :meth:`tokens`.
            memory_bytes: memory of the machine (or device); ``None`` when unknown.

        Raises:
            UsageError: below the policy's minimum, or larger than the memory.
        """
        self.tokens(n_ctx, bytes_per_token, min_budget)
        if memory_bytes is None:
            return
        if self.unit == "bytes" and self.value > memory_bytes:
            raise UsageError(f"A budget of {self} is larger than the memory of {format_bytes(memory_bytes, up=False)}.")
        if self.unit == "tokens":
            needed = min(int(self.value), n_ctx) * bytes_per_token
            if needed > memory_bytes:
                raise UsageError(
                    f"A budget of {self} tokens per head takes {format_bytes(needed)}, "
                    f"larger than the memory of {format_bytes(memory_bytes, up=False)}."
                )


def format_bytes(n: int, *, up: bool = True) -> str:
    """``n`` bytes for people, in binary units with one decimal, rounded up (a need) or down (a limit)."""
    for name, size in _BINARY.items():
        if n >= size:
            tenths = -(-n * 10 // size) if up else n * 10 // size
            return f"{tenths / 10:g} {name}"
    return f"{n} B"
