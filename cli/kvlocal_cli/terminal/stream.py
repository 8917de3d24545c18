"""An answer on its way to standard output, and Ctrl-C while it is."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # the exit code of a shell's command that Ctrl-C ended


class Interrupt:
    """Ctrl-C as a request: the first one is noted and obeyed between two steps, the second one raises.

    An exception in the middle of a decode step could leave the cache and the list of its tokens out of step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.requested:
            raise KeyboardInterrupt

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Answer:
    """Standard output while one answer is written: always flushed, always ended by a newline."""

    def __init__(self, *, live: bool = True) -> None:
        """`live`: write pieces as they come, not all at the end."""
        self._live = live
        self._held: list[str] = []
        self._last = ""
        self.started = False

    def write(self, piece: str) -> None:
        self.started = True
        self._last = piece or self._last
        if self._live:
            _out(piece)
        else:
            self._held.append(piece)

    def end(self) -> None:
        _out("".join(self._held) + ("" if self._last.endswith("\n") else "\n"))


def stream(pieces: Iterator[str], write: Callable[[str], None], interrupt: Interrupt) -> None:
    """Write the pieces until they end or Ctrl-C is pressed (then `interrupt.requested` is True); close them."""
    try:
        for piece in pieces:
            write(piece)
            if interrupt.requested:
                return
    except KeyboardInterrupt:
        interrupt.requested = True
    finally:
        # The engine and the chat end an answer properly when their generator is closed, not when it is collected.
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
