"""Where a prompt comes from: an option, a file, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal_cli.options import twins

HOW = "give one with -p TEXT, with -f FILE, or through a pipe"


def gather(prompt: str | None, files: Sequence[str]) -> str:
    """The prompt: the texts of `files` (else of a pipe) and then the text of -p, a blank line between them."""
    if prompt is not None:
        check_text(prompt, "the text of -p")
    if files.count("-") > 1:
        raise UsageError(f"-f - is given {files.count('-')} times, and standard input can be read once.")
    documents = [read_stdin() if file == "-" else read_file(file) for file in files]
    if not files and not stdin_is_terminal():
        documents = [read_stdin()]
    if not documents and prompt is None:
        raise UsageError(f"there is no prompt; {HOW}.")
    parts = [*(document.rstrip("\n") for document in documents), prompt or ""]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise UsageError(f"the prompt is empty; {HOW}.")
    return text


def read_file(path: str) -> str:
    """The text of a UTF-8 file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'.") from None
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror}.") from None
    return decode(data, f"'{path}'")


def file_path(text: str) -> Path:
    """A file as it was typed, `~` and all."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"'{text}' names the home of somebody who is not known here.") from None


def read_stdin() -> str:
    """All of standard input."""
    return "" if sys.stdin is None else decode(sys.stdin.buffer.read(), "standard input")


def stdin_lines() -> Iterator[str]:
    """Standard input line by line, each as soon as it is there."""
    if sys.stdin is None:
        return
    offset = 0
    for line in sys.stdin.buffer:
        yield decode(line, "standard input", offset)
        offset += len(line)


def stdin_is_terminal() -> bool:
    """True if somebody can type; a closed standard input is an empty pipe."""
    return sys.stdin is not None and sys.stdin.isatty()


def decode(data: bytes, source: str, offset: int = 0) -> str:
    """`data` as text; a byte that is not UTF-8 is named with its offset."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
            "convert it to UTF-8 first."
        ) from None


def system_text(system: str | None, *, raw: bool = False) -> str | None:
    """The text of -sys; None without one, or where --no-chat-template was given nearer to the command line."""
    if system is None or (raw and twins.overruled("system", by="raw")):
        return None
    check_text(system, "the text of -sys")
    if raw:
        raise UsageError("-sys needs the chat template; leave out --no-chat-template, or put the text into the prompt.")
    return system


def check_text(text: str, source: str) -> None:
    """Refuse text from the command line whose bytes were not UTF-8 (Python smuggles them in as surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{source} is not UTF-8 at character {error.start}; convert it to UTF-8 first.") from None
