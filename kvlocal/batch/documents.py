"""Documents of a batch, from files, directories, globs and JSON Lines; and the file that their results go to."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from kvlocal.errors import KVError, UsageError
from kvlocal.files import replace_file
from kvlocal.jsonl import parse_row

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are the user's to avoid
    fcntl = None  # type: ignore[assignment]

SUFFIXES = (".txt", ".md", ".jsonl")
"""Files of a directory that are documents."""


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


def read_documents(inputs: Sequence[str], fields: Fields, but: Path | None = None) -> list[Document]:
    """All documents of files, directories and globs; a .jsonl file has one per line. In this order, directories sorted.

    One that cannot be read is there as well, with its ``fault``. ``but``: a file of a directory or glob that is none,
    such as the one that the results go to.

    Raises:
        UsageError: an input that is not there, none at all, or two documents with one id.
    """
    found: dict[str, Document] = {}
    for path in _paths(inputs, but):
        for document in _rows(path, fields) if path.suffix == ".jsonl" else [_text(path)]:
            other = found.setdefault(document.id, document)
            if other is not document:
                raise UsageError(
                    f"Two documents have the id '{document.id}', {other.source} and {document.source}; name each "
                    "file once, and give every line its own id."
                )
    if not found:
        raise UsageError(f"There are no documents in {', '.join(inputs) or 'no inputs'}; give text or .jsonl files.")
    return list(found.values())


def _paths(inputs: Sequence[str], but: Path | None) -> Iterator[Path]:
    out = but.resolve() if but is not None else None
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
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


def _text(path: Path) -> Document:
    name = _plain(str(path))
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        return Document(name, name, fault=f"'{path}' is not UTF-8 (byte {error.start}).")
    except OSError as error:
        return Document(name, name, fault=f"'{path}' cannot be read: {error.strerror}.")
    return Document(name, name, text, fault=None if text else f"'{path}' is empty.")


def _rows(path: Path, fields: Fields) -> Iterator[Document]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        yield Document(str(path), str(path), fault=f"'{path}' cannot be read: {error.strerror}.")
        return
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        source = _plain(f"{path}:{number}")
        try:
            row = parse_row(f"{path}, line {number}", number, data).fields
        except UsageError as error:
            yield Document(source, source, fault=str(error))
            continue
        name = row.get(fields.id, source)
        text, question = row.get(fields.text), row.get(fields.question, "")
        fault = None
        if not isinstance(name, str | int):
            name, fault = source, f"{path}, line {number}: the field '{fields.id}' must be a string."
        elif not isinstance(text, str) or not text.strip():
            there = ", ".join(row) or "none"
            fault = (
                f"{path}, line {number}: the field '{fields.text}' must be a text; the fields are {there} (--field)."
            )
        elif not isinstance(question, str):
            fault = f"{path}, line {number}: the field '{fields.question}' must be a string."
        if fault is None and any(part != _plain(part) for part in (str(name), str(text), str(question))):
            fault = f"{path}, line {number}: a field holds half a character (a surrogate), which is not Unicode."
        if fault:
            yield Document(_plain(str(name)), source, fault=_plain(fault))
        else:
            yield Document(str(name), source, str(text).strip(), str(question).strip())


class Results:
    """A JSON Lines file, one line per document, each written at once as soon as it is there.

    Use as a context manager. A line that was cut short, by a process that was killed while writing it, is taken away
    when the file is opened again.

    Attributes:
        done: ids of the documents that are in the file, without an error.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """``resume``: go on with a file that is there; lines with an error are taken out, so that they are tried again.

        Raises:
            UsageError: the file holds results and is not to be resumed, or holds something else, or is in use.
            KVError: it cannot be written.
        """
        self.path = path
        self.done: set[str] = set()
        try:
            self._file: BinaryIO = path.open("ab+", buffering=0)
            self._lock()
            if self._file.tell() or path.stat().st_size:
                self._go_on(resume)
        except OSError as error:
            raise KVError(f"{path} cannot be written: {error.strerror or error}.") from error

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"Another run is writing to {self.path}; wait for it, or name another file.") from None

    def _go_on(self, resume: bool) -> None:
        lines = self.path.read_bytes().split(b"\n")
        torn = lines.pop()  # what follows the last end of a line
        kept = []
        for number, line in enumerate(lines, start=1):
            row = parse_row(f"{self.path}, line {number}", number, line).fields
            if not {"id", "text", "error"} <= row.keys() or not isinstance(row["id"], str):
                raise UsageError(f"{self.path}, line {number} is not a result of a batch; name another file with -o.")
            if row["error"] is None:
                self.done.add(row["id"])
                kept.append(line)
        if not resume:
            raise UsageError(
                f"{self.path} holds {len(lines)} results already; go on with --resume, or name another file with -o."
            )
        if torn or len(kept) < len(lines):
            self._replace(b"".join(line + b"\n" for line in kept))

    def _replace(self, data: bytes) -> None:
        replace_file(self.path, data)
        self._file.close()
        self._file = self.path.open("ab+", buffering=0)
        self._lock()

    def put(self, result: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            KVError: it cannot be written.
        """
        line = json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise KVError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
