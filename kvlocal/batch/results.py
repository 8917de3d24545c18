"""What the results of a batch are written to: a JSON Lines file that can be gone on with, a pipe, standard output."""

from __future__ import annotations

import hashlib
import json
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kvlocal.errors import KVError, UsageError
from kvlocal.files import replace_file
from kvlocal.jsonl import parse_row

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are the user's to avoid
    fcntl = None  # type: ignore[assignment]

_SHOWN = 60  # characters of a setting that a line has

WHAT = {
    "model": "model",
    "instruction": "instruction",
    "question": "question",
    "system": "system prompt (-sys)",
    "raw": "use of the chat template (--no-chat-template)",
    "policy": "policy",
    "policy_args": "set of policy parameters",
    "policy_code": "version of the policy's code",
    "budget": "budget",
    "parallel": "--parallel, which a budget in bytes is divided by",
    "kv": "storage (--kv)",
    "n_ctx": "context (-c)",
    "n_predict": "length of the answers (-n)",
    "sampling": "sampling",
    "field": "field of the text (--field)",
}
"""Names of settings in a sentence; others are called as they are."""


class Results:
    """JSON Lines, one per document, each written at once as soon as it is there.

    Use as a context manager. A line that was cut short, by a process that was killed while writing it, is taken away
    when a file is opened again.

    Attributes:
        done: ids of the documents that are in the file, without an error.
    """

    def __init__(
        self, path: Path | None, *, resume: bool = False, settings: Mapping[str, str | int | bool] | None = None
    ) -> None:
        """
        Args:
            path: ``None``: standard output.
            resume: go on with a file that is there; lines with an error are taken out, so that they are tried again.
            settings: what the results depend on, written into every line. A file made with others is not gone on with.

        Raises:
            UsageError: the file holds results and is not to be resumed, was made with other settings, holds something
                else, or is in use; or what is to be resumed is no file.
            KVError: it cannot be written.
        """
        self.path = path
        self.done: set[str] = set()
        self._file: BinaryIO
        self.settings = {name: _short(value) for name, value in (settings or {}).items()}
        try:
            if path is None:
                self._stream(sys.stdout.buffer if sys.stdout is not None else None, "standard output", resume)
            elif path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
                self._stream(path.open("wb", buffering=0), str(path), resume)
            else:
                self._open(path, resume)
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def name(self) -> str:
        """The file, for a sentence."""
        return "standard output" if self.path is None else str(self.path)

    def _stream(self, file: BinaryIO | None, name: str, resume: bool) -> None:
        if file is None:
            raise UsageError("Standard output is closed; name a file with -o.")
        if resume:
            raise UsageError(f"What was written to {name} cannot be gone on with; name a file with -o, or no --resume.")
        self._file = file

    def _open(self, path: Path, resume: bool) -> None:
        self._file = path.open("ab+", buffering=0)
        try:
            self._lock()
            if path.stat().st_size:
                self._go_on(path, resume)
        except BaseException:
            self._file.close()  # which gives the lock back
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"Another run is writing to {self.path}; wait for it, or name another file.") from None

    def _go_on(self, path: Path, resume: bool) -> None:
        lines = path.read_bytes().split(b"\n")
        torn = lines.pop()  # what follows the last end of a line
        kept = []
        for number, line in enumerate(lines, start=1):
            row = parse_row(f"{path}, line {number}", number, line).fields
            if not {"id", "text", "error"} <= row.keys() or not isinstance(row["id"], str):
                raise UsageError(f"{path}, line {number} is not a result of a batch; name another file with -o.")
            if resume:
                self._compare(number, row.get("settings"))
            if row["error"] is None:
                self.done.add(row["id"])
                kept.append(line)
        if not resume:
            raise UsageError(
                f"{path} holds {len(lines)} results already; go on with --resume, or name another file with -o."
            )
        if torn or len(kept) < len(lines):
            self._replace(path, b"".join(line + b"\n" for line in kept))

    def _compare(self, number: int, found: Any) -> None:
        """Refuse to mix results of different settings; nothing is known of lines that name none."""
        if not isinstance(found, dict) or not self.settings:
            return
        for name in {**found, **self.settings}:
            before, now = found.get(name), self.settings.get(name)
            if before != now:
                raise UsageError(
                    f"{self.path}, line {number} was made with another {WHAT.get(name, name)}: {_told(before)}, now "
                    f"{_told(now)}; go on with the same settings, or name another file with -o."
                )

    def _replace(self, path: Path, data: bytes) -> None:
        replace_file(path, data)
        self._file.close()
        self._file = path.open("ab+", buffering=0)
        self._lock()

    def put(self, result: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            KVError: it cannot be written.
        """
        values = {**result, "settings": self.settings} if self.settings else result
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> KVError:
        return KVError(f"{self.name} cannot be written: {error.strerror or error}.")

    def close(self) -> None:
        if self.path is not None:
            self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _short(value: str | int | bool) -> str | int | bool:
    """A setting as a line has it: of a long text the beginning, and a hash of all."""
    if not isinstance(value, str) or len(value) <= _SHOWN:
        return value
    return f"{value[:_SHOWN]}… sha256:{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _told(value: Any) -> str:
    return "none" if value in (None, "") else repr(value)
