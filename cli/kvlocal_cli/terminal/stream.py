"""An answer on its way to standard output."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvlocal_cli.render.controls import plain
from kvlocal_cli.terminal.interrupt import Ended, Interrupt
from kvlocal_cli.terminal.status_line import StatusLine, can_draw

if TYPE_CHECKING:
    from kvlocal_cli.terminal.wrap import Wrapper


class Answer:
    """Standard output while one answer is written: always flushed, always ended by a newline.

    On a terminal lines are broken between words, and no control characters get through; elsewhere every byte is as it
    comes.
    """

    def __init__(self, *, live: bool = True, figures: Callable[[int], str] | None = None) -> None:
        """`live`: write pieces as they come, not all at the end. `figures`: the line below it, for a width."""
        self._live = live
        self._held: list[str] = []
        self._last = ""
        self.started = False
        self._status = StatusLine(figures, self._width) if live and figures and can_draw() else None
        self._wrapper: Wrapper | None = None
        if sys.stdout.isatty():
            from kvlocal_cli.terminal.wrap import Wrapper  # loads rich, which a pipe does not need

            self._wrapper = Wrapper(self._width)

    def write(self, piece: str) -> None:
        """The next piece."""
        self.started = True
        self._last = piece or self._last
        if self._live:
            self._put(self._wrapper.feed(plain(piece)) if self._wrapper else piece)
        else:
            self._held.append(piece)

    def end(self) -> None:
        """Nothing follows."""
        text = "".join(self._held)
        if self._wrapper:
            text = self._wrapper.feed(plain(text)) + self._wrapper.end()
        gone = self._status.gone() if self._status else ""
        _out(gone + text + ("" if self._last.endswith("\n") else "\n"))

    def hide_figures(self) -> None:
        """Take the line below the answer away, until the next piece; a signal handler may call it."""
        gone = self._status.gone() if self._status else ""
        if gone:
            os.write(sys.stdout.fileno(), gone.encode())  # all else is flushed; the stream's own write may be under way

    def _put(self, text: str) -> None:
        _out(self._status.around(text) if self._status else text)

    def _width(self) -> int:
        """Columns to write on; the last one stays free where the cursor is moved."""
        return max(window_width() - (self._status is not None), 2)


def window_width() -> int:
    """Columns of the window that standard output is, now; 80 if it does not know."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def stream(pieces: Iterator[str], write: Callable[[str], None], interrupt: Interrupt) -> None:
    """Write the pieces until they end or a signal comes (then `interrupt.requested` is True); close them."""
    try:
        for piece in pieces:
            write(piece)
            if interrupt.requested:
                return
    except (KeyboardInterrupt, Ended):
        interrupt.requested = True
    finally:
        # The engine and the chat end an answer properly when their generator is closed, not when it is collected.
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _out(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
