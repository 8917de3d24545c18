"""Rows of a JSON Lines file, with errors that name the file, the line and the field."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlocal.errors import KVError, UsageError


@dataclass(frozen=True)
class Kind:
    """What a field holds: ``name`` as it is read after "must be", ``accepts`` whether a value is of this kind."""

    name: str
    accepts: Callable[[object], bool]


TEXT = Kind("a string", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
TEXTS = Kind(
    "a list of one or more strings that are not empty",
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value),
)
PAIRS = Kind(
    "a list of one or more pairs of strings",
    lambda value: isinstance(value, list)
    and bool(value)
    and all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, str) for v in pair) for pair in value),
)


@dataclass(frozen=True)
class Row:
    """One object of the file; ``place`` is its file and line, to begin an error message with."""

    place: str
    line: int
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def require(self, fields: Mapping[str, Kind]) -> None:
        """Raises :class:`UsageError` unless each of these fields is there and of its kind."""
        for name, kind in fields.items():
            if name not in self.fields:
                raise UsageError(f"{self.place}: the field '{name}' is missing; it must be {kind.name}.")
            if not kind.accepts(self.fields[name]):
                raise UsageError(f"{self.place}: the field '{name}' must be {kind.name}.")


def read_rows(path: Path, fields: Mapping[str, Kind], *, rows: int = 0) -> list[Row]:
    """The first ``rows`` objects of the file, all of them for 0. Lines without text are passed over.

    Args:
        fields: those that every row must have.

    Raises:
        UsageError: no such file, no row in it, a line that is not a JSON object or lacks a field, ``rows`` below 0.
        KVError: the file cannot be read.
    """
    if rows < 0:
        raise UsageError(f"rows is {rows}; give 0 for all rows, or how many.")
    found: list[Row] = []
    try:
        # as bytes: a line ends with "\n" only, and a fault in the encoding has a line number
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                if not data.strip():
                    continue
                found.append(parse_row(f"{path}, line {line}", line, data))
                found[-1].require(fields)
                if len(found) == rows:
                    break
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}; give the path of a .jsonl file.") from None
    except OSError as error:
        raise KVError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not found:
        raise UsageError(f"{path} holds no rows; give a file with one JSON object per line.")
    return found


def parse_row(place: str, line: int, data: bytes) -> Row:
    """One line; ``place`` begins the message of what is wrong with it.

    Raises:
        UsageError: it is not a JSON object in UTF-8.
    """
    try:
        # some editors begin a file with a byte order mark
        value = json.loads((data.removeprefix(codecs.BOM_UTF8) if line == 1 else data).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from None
    except (RecursionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise UsageError(f"{place}: JSON that is nested or numbers that are too long ({error}).") from None
        raise UsageError(f"{place}: not JSON ({error.msg}, column {error.colno}); give one object per line.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{place}: a JSON {type(value).__name__}, not an object; give one object per line.")
    return Row(place, line, value)
