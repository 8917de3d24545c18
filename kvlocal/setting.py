"""What a setting is: the command line's option, Python's keyword, and the values that it takes."""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvlocal.errors import UsageError

MAX_INT = 2**31 - 1
"""The most that llama.cpp's whole numbers (int32) hold."""

MAX_TOKENS = 2**30
"""The most tokens of a context or a batch that the paged cache can index."""

MAX_SEED = 2**32 - 2
"""llama.cpp's own -1 is the one number above it."""

MAX_THREADS = 512
"""llama.cpp's GGML_MAX_N_THREADS; more end the process."""

MAX_SEQUENCES = 256
"""llama.cpp's LLAMA_MAX_SEQ: sequences that a cache can hold."""

Taker = Literal["load", "sampling", "answer", "command"]


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: what the configurations call it, such as ``n_ctx``.
        flags: the options of the command line; the first long one names its variable and its key.
        section: where a help page lists it.
        default: None: nothing.
        help: the sentence of help pages and of the table.
        metavar: what a help page shows for the value.
        keyword: what Python calls it; by default its name.
        noun: what an error calls it; by default its keyword.
        taker: what takes the keyword: :func:`kvlocal.load`; ``sampling`` and what else an ``answer`` takes
            (``generate``, ``stream``, ``ask``, ``again``); or only a ``command``.
    """

    name: str
    flags: tuple[str, ...]
    section: str
    default: Any
    help: str
    metavar: str | None = None
    keyword: str = ""
    noun: str = ""
    taker: Taker = "load"

    def __post_init__(self) -> None:
        if not self.keyword and self.taker != "command":
            object.__setattr__(self, "keyword", self.name)

    @property
    def key(self) -> str:
        """Its key in the configuration file, such as ``ctx-size``."""
        return next(flag for flag in self.flags if flag.startswith("--")).removeprefix("--")

    @property
    def variable(self) -> str:
        """Its environment variable, such as ``KVLOCAL_CTX_SIZE``."""
        return f"KVLOCAL_{self.key.upper().replace('-', '_')}"

    @property
    def allowed(self) -> str:
        """The allowed values, to be read after "give"."""
        return "a text"

    def accepts(self, value: object) -> bool:
        """Whether a value has the right type and lies in the range."""
        return isinstance(value, str)

    def check(self, value: Any) -> Any:
        """The value as a plain Python one (numpy's numbers are taken).

        Raises:
            UsageError: another type, or out of range.
        """
        if value is None and self.default is None:
            return None
        if not self.accepts(value):
            raise refusal(self.noun or self.keyword or self.name, value, self.allowed)
        return value


@dataclass(frozen=True)
class Whole(Setting):
    """A whole number from ``low`` to ``high``."""

    metavar: str | None = "N"
    low: int = 0
    high: int = MAX_INT

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and self.low <= int(value) <= self.high  # type: ignore[call-overload]

    def check(self, value: Any) -> Any:
        value = super().check(value)
        return None if value is None else int(value)


@dataclass(frozen=True)
class Real(Setting):
    """A finite number from ``low`` to ``high``; ``above``: not ``low`` itself."""

    low: float = 0
    high: float = 1
    above: bool = False

    @property
    def allowed(self) -> str:
        return f"a number {f'above {self.low:g} and at most' if self.above else f'from {self.low:g} to'} {self.high:g}"

    def accepts(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return self.low <= float(value) <= self.high and not (self.above and float(value) == self.low)

    def check(self, value: Any) -> Any:
        return float(super().check(value))


@dataclass(frozen=True)
class Choice(Setting):
    """One of some texts."""

    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return " or ".join(self.choices)

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class Flag(Setting):
    """Yes or no."""

    @property
    def allowed(self) -> str:
        return "True or False"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Size(Setting):
    """A budget: a text, or a number of tokens."""

    metavar: str | None = "SIZE"

    @property
    def allowed(self) -> str:
        return 'tokens per head (1024), a share ("25%") or bytes ("512MiB")'

    def accepts(self, value: object) -> bool:
        return isinstance(value, str | numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Pairs(Setting):
    """Names and values; on the command line an option that may be repeated."""

    metavar: str | None = "NAME=VALUE"

    @property
    def allowed(self) -> str:
        return "names and values, as a dict"

    def accepts(self, value: object) -> bool:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class File(Setting):
    """The path of a file."""

    @property
    def allowed(self) -> str:
        return "a path, as a text or a Path"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str) and bool(os.fspath(value))


def refusal(name: str, value: object, allowed: str) -> UsageError:
    """The error for a value of a setting that is not allowed."""
    return UsageError(f"{name} is {reprlib.repr(value)}; give {allowed}.")
