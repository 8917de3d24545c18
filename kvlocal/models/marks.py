"""Marks that stand for what people wrote while a chat template is rendered, so that its own text is known from theirs.

A mark is a word of ordinary letters, which no template alters in a way that cannot be followed. White space around a
text stays as it is, since templates trim it. Literals that a template looks for in a text (``</think>``) may stay too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlocal.errors import UsageError

STEM = "kvlocaltextmark"
_MARK = re.compile(STEM + "([a-z]{6})")
_PLAIN = re.compile(r"[\w.:/-]*")
_NAMES = frozenset({"role", "type", "name", "id", "tool_call_id"})
"""Keys whose values templates compare and look up: a plain word there stays as it is."""
_JSON_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation.

    Attributes:
        control: the template's own text, in which control tokens are read; otherwise text of a message.
        message: index of the message that it comes from, ``None`` for the template's own.
        path: where in the message, ``("content",)`` for its text.
    """

    text: str
    control: bool
    message: int | None = None
    path: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class _Field:
    """A text of a message: ``gaps[0] cores[0] gaps[1] … gaps[-1]``; marks from ``first`` on stand for the cores."""

    message: int
    path: tuple[str | int, ...]
    first: int
    cores: list[str]
    gaps: list[str]


class Marks:
    """Replaces the texts of messages by marks.

    ``literals``: what stays in the texts of messages for which ``keeps(message)`` holds.
    ``trim``: white space around marks does not stay.
    """

    def __init__(
        self, literals: Sequence[str] = (), keeps: Callable[[Mapping[str, Any]], bool] = bool, *, trim: bool = False
    ) -> None:
        self._literals = (
            re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True)))) if literals else None
        )
        self._keeps, self._trim = keeps, trim
        self._marks: list[_Field] = []  # the field of every mark

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of messages with marks in the place of texts."""
        return [self._message(i, message) for i, message in enumerate(messages)]

    def _message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        literals = self._literals if self._keeps(message) else None
        return {key: self._value(index, (key,), value, literals) for key, value in message.items()}

    def _value(self, index: int, path: tuple[str | int, ...], value: Any, literals: re.Pattern[str] | None) -> Any:
        if isinstance(value, Mapping):
            return {
                self._value(index, (*path, "name"), key, None): self._value(index, (*path, key), item, literals)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._value(index, (*path, i), item, literals) for i, item in enumerate(value)]
        if not isinstance(value, str) or (path[-1] in _NAMES and _PLAIN.fullmatch(value) and STEM not in value):
            return value
        if path[-1] == "arguments" and _is_json(value):
            # templates parse it; what is between its texts are numbers and brackets
            return _JSON_TEXT.sub(lambda m: '"' + self._text(index, path, m[1], None) + '"', value)
        return self._text(index, path, value, literals)

    def _text(self, index: int, path: tuple[str | int, ...], text: str, literals: re.Pattern[str] | None) -> str:
        runs = _split(text, literals)
        cores, gaps = [], [""]
        for run, is_literal in runs:
            core = "" if is_literal else run.strip()
            if not core:
                gaps[-1] += run
                continue
            start = run.index(core)
            gaps[-1] += run[:start]
            cores.append(core)
            gaps.append(run[start + len(core) :])
        if cores and self._trim:
            gaps = [gap.strip() for gap in gaps]
        field = _Field(index, path, len(self._marks), cores, gaps)
        self._marks += [field] * len(cores)
        marks = [_mark(field.first + i) for i in range(len(cores))]
        return "".join(part for pair in zip(gaps, [*marks, ""], strict=True) for part in pair)

    def cut(self, rendered: str, trimmed: str | None, known: Sequence[Piece] = ()) -> Iterator[Piece]:
        """Pieces of a rendered text, each mark replaced by what it stands for.

        ``trimmed``: the text that the same messages give with ``trim``; ``None`` without white space around marks.
        ``known``: pieces of the same messages without literals.
        """
        written = _between_messages(known)
        parts = _MARK.split(rendered)
        plain = None if trimmed is None else _MARK.split(trimmed)
        if plain is not None and plain[1::2] != parts[1::2]:
            plain = None
        before: int | None = None
        for i in range(0, len(parts), 2):
            after = _number(parts[i + 1]) if i + 1 < len(parts) else None
            if after is not None and after >= len(self._marks):
                raise UsageError(f"The chat template writes {STEM}, which stands for texts; use another.")
            here = tuple(None if mark is None else self._marks[mark].message for mark in (before, after))
            usual = written.get(here, "")
            space_before, found, space_after = parts[i].partition(usual) if usual else ("", "", "")
            if found and not (space_before + space_after).strip():
                # what the template writes there anyway, though a text may have the same literals
                yield from self._parts(before, space_before, usual, space_after, after)
            else:
                yield from self._between(before, parts[i], after, None if plain is None else plain[i])
            if after is not None:
                field = self._marks[after]
                yield Piece(field.cores[after - field.first], False, field.message, field.path)
            before = after

    def _between(self, before: int | None, text: str, after: int | None, plain: str | None) -> Iterator[Piece]:
        """The text between two marks: what belongs to the texts on both sides, and the template's own."""
        left = None if before is None else self._marks[before]
        right = None if after is None else self._marks[after]
        trail = "" if left is None or before is None else left.gaps[before - left.first + 1]
        lead = "" if right is None or after is None else right.gaps[after - right.first]
        if left is not None and left is right and after == (before or 0) + 1 and _same(text, trail):
            yield Piece(text, False, left.message, left.path)
            return
        start, end = _literals(trail, text, lead)
        if plain is not None:
            # white space next to a mark, where no literal of its text is shown
            first, last = _literals(trail, plain, lead)
            space_after = "" if start else trail[: len(trail) - len(trail.lstrip())]
            space_before = "" if end < len(text) else lead[len(lead.rstrip()) :]
            n, m = _white(space_after, text[start:end], space_before, plain[first:last])
            start, end = start + n, start + m
        yield from self._parts(before, text[:start], text[start:end], text[end:], after)

    def _parts(self, before: int | None, left: str, text: str, right: str, after: int | None) -> Iterator[Piece]:
        """The template's own text between two marks, with what belongs to the texts on both sides."""
        yield self._piece(before, left)
        yield Piece(text, True)
        yield self._piece(after, right)

    def _piece(self, mark: int | None, text: str) -> Piece:
        """A text next to a mark."""
        if mark is None:
            return Piece(text, True)
        return Piece(text, False, self._marks[mark].message, self._marks[mark].path)


def merged(pieces: Iterator[Piece]) -> list[Piece]:
    """Pieces with neighbours of one origin joined, without empty ones."""
    out: list[Piece] = []
    for piece in pieces:
        if not piece.text:
            continue
        if out and (out[-1].control, out[-1].message, out[-1].path) == (piece.control, piece.message, piece.path):
            piece = Piece(out.pop().text + piece.text, piece.control, piece.message, piece.path)
        out.append(piece)
    return out


def _between_messages(pieces: Sequence[Piece]) -> dict[tuple[int | None, ...], str]:
    """What a template writes between the texts of two messages."""
    ends = [None, *(piece.message for piece in pieces), None]
    return {(ends[i], ends[i + 2]): piece.text for i, piece in enumerate(pieces) if piece.control}


def _mark(number: int) -> str:
    letters = ""
    for _ in range(6):
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
    return STEM + letters


def _number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _split(text: str, literals: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """Runs of a text, and whether each is a literal."""
    end = 0
    for match in literals.finditer(text) if literals else ():
        yield text[end : match.start()], False
        yield match[0], True
        end = match.end()
    yield text[end:], False


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _same(a: str, b: str) -> bool:
    """Equal but for white space."""
    return "".join(a.split()) == "".join(b.split())


def _literals(trail: str, text: str, lead: str) -> tuple[int, int]:
    """Start and end of what is left of ``text`` without literals that the texts around it end and begin with."""
    start = _n_kept(trail, text, at_end=False) if trail.strip() else 0
    return start, len(text) - (_n_kept(lead, text[start:], at_end=True) if lead.strip() else 0)


def _n_kept(gap: str, text: str, *, at_end: bool) -> int:
    """How many characters at the start or end of ``text`` come from a gap with literals; white space may differ."""
    words = gap.split()
    for n in range(len(words), 0, -1):
        some = words[-n:] if at_end else words[:n]
        body = r"\s*".join(map(re.escape, some))
        match = re.search(body + r"\s*\Z", text) if at_end else re.match(r"\s*" + body, text)
        if match:
            return len(match[0])
    return 0


def _white(trail: str, text: str, lead: str, plain: str) -> tuple[int, int]:
    """Start and end of the template's own text, which is ``plain``, between white space of the texts around it."""
    extra = len(text) - len(plain)
    for start in (len(trail), 0, extra - len(lead), min(extra, len(trail))):
        end = start + len(plain)
        fits = 0 <= start <= end <= len(text) and text[start:end] == plain
        if fits and trail.startswith(text[:start]) and lead.endswith(text[end:]):
            return start, end
    return 0, len(text)
