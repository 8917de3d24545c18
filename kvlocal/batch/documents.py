"""Documents of a batch, from files, directories, globs and JSON Lines: listed first, read when their turn comes."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal.jsonl import parse_row

SUFFIXES = (".txt", ".md", ".jsonl")
"""Files of a directory that are documents, in upper or lower case."""

_JSONL = ".jsonl"


@dataclass(frozen=True)
class Document:
    """A text to work on.

    Attributes:
        id: its name among all of a run; source: the file it comes from, with the line in a .jsonl file.
        question: what to do with this one, after its text; empty: nothing but the instruction of all.
        fault: why there is no text, one sentence.
    """

    id: str
    source: str
    text: str = ""
    question: str = ""
    fault: str | None = None

    def asked(self, question: str, *, needed: bool = False) -> Document:
        """With this question if it has none; where one is ``needed`` and missing, that is its fault."""
        out = replace(self, question=self.question or question)
        if not needed or out.question or out.fault:
            return out
        fault = "There is no question: give the line a field 'question', or --question TEXT."
        return replace(out, fault=f"{self.source}: {fault}")


@dataclass(frozen=True)
class Fields:
    """Names in a .jsonl file: of the text, of the id (optional there) and of the question (likewise)."""

    text: str = "text"
    id: str = "id"
    question: str = "question"


@dataclass(frozen=True)
class _Place:
    """Where a document is: a whole file, or with a ``line`` (from 1) so many bytes of one from ``offset`` on.

    ``held``: what cannot be read again, as that of a pipe.
    """

    id: str
    source: str
    path: Path
    size: int
    line: int = 0
    offset: int = 0
    held: Document | None = None


class Documents:
    """The documents of a run, by their places: iterating reads them, one at a time, and keeps none.

    ``len`` says how many there are. Any number of iterations may go on at once.
    """

    def __init__(
        self, places: Sequence[_Place], fields: Fields, question: str = "", *, needs_question: bool = False
    ) -> None:
        self._places, self._fields = places, fields
        self._question, self._needs_question = question, needs_question

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Documents:
        """Documents that are there already."""
        places = [_Place(d.id, d.source, Path(d.source), len(d.text.encode()), held=d) for d in documents]
        return cls(places, Fields())

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Document]:
        return map(self._read, self._places)

    def asked(self, question: str, *, needed: bool = False) -> Documents:
        """The same with a question for those that have none; see :meth:`Document.asked`."""
        return Documents(self._places, self._fields, question, needs_question=needed)

    def without(self, done: Container[str]) -> Documents:
        """Those whose id is not among ``done``."""
        left = [place for place in self._places if place.id not in done]
        return Documents(left, self._fields, self._question, needs_question=self._needs_question)

    def largest_first(self) -> Iterator[tuple[int, Callable[[], Document]]]:
        """The most bytes that text and question can have, and what reads the document, the largest first."""
        for place in sorted(self._places, key=lambda place: -place.size):
            yield place.size + len(self._question.encode()), functools.partial(self._read, place)

    def _read(self, place: _Place) -> Document:
        document = place.held or (_row(place, self._fields) if place.line else _text(place.path))
        if document.id != place.id:
            fault = f"{place.source} was changed while the batch went on."
            document = Document(place.id, place.source, fault=fault)
        return document.asked(self._question, needed=self._needs_question)


def read_documents(inputs: Sequence[str], fields: Fields, but: Path | None = None) -> Documents:
    """All documents of files, directories and globs; a .jsonl file has one per line. In this order, directories sorted.

    One that cannot be read is there as well, with its ``fault``. ``but``: a file of a directory or glob that is none,
    such as the one that the results go to. Texts are not kept, but for those of pipes.

    Raises:
        UsageError: an input that is not there, none at all, or two documents with one id.
    """
    found: dict[str, _Place] = {}
    for path in _paths(inputs, but):
        for place in _list(path, fields):
            other = found.setdefault(place.id, place)
            if other is not place:
                raise UsageError(
                    f"Two documents have the id '{place.id}', {other.source} and {place.source}; name each "
                    "file once, and give every line its own id."
                )
    if not found:
        raise UsageError(f"There are no documents in {', '.join(inputs) or 'no inputs'}; give text or .jsonl files.")
    return Documents(list(found.values()), fields)


def _paths(inputs: Sequence[str], but: Path | None) -> Iterator[Path]:
    out = but.resolve() if but is not None else None
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            yield from sorted(p for p in files if p.is_file() and p.resolve() != out)
        elif path.exists():
            yield path
        elif matches := sorted(glob.glob(name, recursive=True)):
            yield from (p for p in map(Path, matches) if p.is_file() and p.resolve() != out)
        else:
            raise UsageError(f"There is no file '{name}', and no file matches it.")


def _plain(text: str) -> str:
    """Text that can be written: what is not Unicode (Python smuggles it in as surrogates) is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _list(path: Path, fields: Fields) -> Iterator[_Place]:
    """The places of a file."""
    again = path.is_file()
    if path.suffix.lower() != _JSONL:
        held = None if again else _text(path)
        name = _plain(str(path))
        yield _Place(name, name, path, path.stat().st_size if held is None else len(held.text.encode()), held=held)
        return
    offset = 0
    try:
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                if data.strip():
                    document = _parse(path, line, data, fields)
                    where = {"line": line, "offset": offset, "held": None if again else document}
                    yield _Place(document.id, document.source, path, len(data), **where)  # type: ignore[arg-type]
                offset += len(data)
    except OSError as error:
        document = _unreadable(path, error)
        yield _Place(document.id, document.source, path, 0, held=document)


def _unreadable(path: Path, error: OSError) -> Document:
    name = _plain(str(path))
    return Document(name, name, fault=f"'{name}' cannot be read: {error.strerror or error}.")


def _text(path: Path) -> Document:
    name = _plain(str(path))
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        return Document(name, name, fault=f"'{name}' is not UTF-8 (byte {error.start}).")
    except OSError as error:
        return _unreadable(path, error)
    return Document(name, name, text, fault=None if text else f"'{name}' is empty.")


def _row(place: _Place, fields: Fields) -> Document:
    """The document of a line that was listed before."""
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
    except OSError as error:
        return replace(_unreadable(place.path, error), id=place.id, source=place.source)
    return _parse(place.path, place.line, data, fields)


def _parse(path: Path, line: int, data: bytes, fields: Fields) -> Document:
    """The document of one line of a .jsonl file."""
    place, source = _plain(f"{path}, line {line}"), _plain(f"{path}:{line}")
    try:
        row = parse_row(place, line, data).fields
    except UsageError as error:
        return Document(source, source, fault=str(error))
    name = row.get(fields.id, source)
    text, question = row.get(fields.text), row.get(fields.question, "")
    fault = None
    if not isinstance(name, str | int):
        name, fault = source, f"{place}: the field '{fields.id}' must be a string."
    elif not isinstance(text, str) or not text.strip():
        there = ", ".join(row) or "none"
        fault = f"{place}: the field '{fields.text}' must be a text; the fields are {there} (--field)."
    elif not isinstance(question, str):
        fault = f"{place}: the field '{fields.question}' must be a string."
    if fault is None and any(part != _plain(part) for part in (str(name), str(text), str(question))):
        fault = f"{place}: a field holds half a character (a surrogate), which is not Unicode."
    if fault:
        return Document(_plain(str(name)), source, fault=_plain(fault))
    return Document(str(name), source, str(text).strip(), str(question).strip())
