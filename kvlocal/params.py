"""Parameters of policies and retrievers: how a value is read from text, and which values are allowed.

Both are frozen dataclasses whose fields are declared with :func:`whole`, :func:`real`, :func:`choice` or
:func:`subset`; their ``__post_init__`` calls :func:`validate`. The same rules feed the command line's error messages
and its tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvlocal.errors import UsageError
from kvlocal.setting import MAX_INT


class Rule(Protocol):
    """What one hyper-parameter may be."""

    @property
    def allowed(self) -> str:
        """The allowed values, to be read after "give"."""

    def parse(self, text: str) -> object:
        """The value that ``text`` stands for; raises ``ValueError``. Does not check the range."""

    def accepts(self, value: object) -> bool:
        """Whether the value has the right type and lies in the range."""


@dataclass(frozen=True)
class Whole:
    low: int
    odd: bool = False

    @property
    def allowed(self) -> str:
        return f"{'an odd' if self.odd else 'a'} whole number of at least {self.low}"

    def parse(self, text: str) -> int:
        return int(text)

    def accepts(self, value: object) -> bool:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            return False
        return self.low <= int(value) <= MAX_INT and (not self.odd or int(value) % 2 == 1)


@dataclass(frozen=True)
class Real:
    low: float
    high: float

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def parse(self, text: str) -> float:
        return float(text)

    def accepts(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        return math.isfinite(value) and self.low <= float(value) <= self.high


@dataclass(frozen=True)
class Choice:
    options: tuple[str | None, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(option or "none" for option in self.options)

    def parse(self, text: str) -> str | None:
        for option in self.options:
            if text.strip().lower() == (option or "none"):
                return option
        raise ValueError(text)

    def accepts(self, value: object) -> bool:
        return any(value is option or (isinstance(value, str) and value == option) for option in self.options)


@dataclass(frozen=True)
class Subset:
    options: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "some of " + ", ".join(self.options) + ", with commas between them"

    def parse(self, text: str) -> str:
        return ",".join(part.strip().lower() for part in text.split(","))

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and set(value.split(",")) <= set(self.options)


def whole(default: int, *, low: int, odd: bool = False, help: str) -> Any:
    """A dataclass field that holds an integer of at least ``low``."""
    return dataclasses.field(default=default, metadata={"rule": Whole(low, odd), "help": help})


def real(default: float, *, low: float, high: float, help: str) -> Any:
    """A dataclass field that holds a finite number in ``[low, high]``."""
    return dataclasses.field(default=default, metadata={"rule": Real(low, high), "help": help})


def choice(default: str | None, options: Sequence[str | None], *, help: str) -> Any:
    """A dataclass field that holds one of ``options``; ``None`` is written ``none``."""
    return dataclasses.field(default=default, metadata={"rule": Choice(tuple(options)), "help": help})


def subset(default: str, options: Sequence[str], *, help: str) -> Any:
    """A dataclass field that holds some of ``options``, joined by commas."""
    return dataclasses.field(default=default, metadata={"rule": Subset(tuple(options)), "help": help})


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter as a row of the policy table."""

    name: str
    default: object
    allowed: str
    help: str


def declared_rules(cls: type) -> dict[str, Rule]:
    """The rule of every hyper-parameter that a policy class declares, in order."""
    return {f.name: f.metadata["rule"] for f in dataclasses.fields(cls) if "rule" in f.metadata}


def parameters(cls: type) -> list[Parameter]:
    """The hyper-parameters that a policy class declares, in order."""
    return [
        Parameter(f.name, f.default, f.metadata["rule"].allowed, f.metadata["help"])
        for f in dataclasses.fields(cls)
        if "rule" in f.metadata
    ]


def refusal(kind: str, owner: str, name: str, value: object, rule: Rule) -> UsageError:
    """The error for a value that the rule does not allow; ``kind``: what ``owner`` is, such as "policy"."""
    allowed = rule.allowed
    if isinstance(rule, Whole) and isinstance(value, numbers.Integral) and int(value) > MAX_INT:
        allowed += f" and at most {MAX_INT}"
    shown = value if isinstance(value, str) and len(value) < 40 else reprlib.repr(value)
    return UsageError(f"{name}={shown} is not possible for {kind} {owner}: give {allowed}.")


def validate(owner: Any) -> None:
    """Raises :class:`UsageError` for the first field of a policy or retriever whose value its rule does not allow."""
    for f in dataclasses.fields(owner):
        rule: Rule | None = f.metadata.get("rule")
        value = getattr(owner, f.name)
        if rule is not None and not rule.accepts(value):
            raise refusal(owner.kind, owner.name, f.name, value, rule)


def values_of(cls: Any, args: Mapping[str, object]) -> dict[str, Any]:
    """Arguments for a policy or retriever class; text is converted to the type of the field.

    Raises:
        UsageError: unknown parameter, or a text that stands for no value.
    """
    rules = declared_rules(cls)
    values: dict[str, Any] = {}
    for key, value in args.items():
        if key not in rules:
            known = f"it has {', '.join(rules)}" if rules else "it has none at all"
            raise UsageError(
                f"{cls.kind.capitalize()} {cls.name} has no parameter {key!r}{closest(key, rules)}; {known}."
            )
        if isinstance(value, str):
            try:
                value = rules[key].parse(value)
            except ValueError:
                raise refusal(cls.kind, cls.name, key, value, rules[key]) from None
        values[key] = value
    return values


def closest(word: str, known: Iterable[str]) -> str:
    """What somebody may have meant, to be put behind a word that is not known."""
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
