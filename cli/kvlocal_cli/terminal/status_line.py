"""A line of figures below an answer that is being written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

_PERIOD_S = 0.2
_SHARE = 0.02
"""Most of the time that the figures may take."""

# one line down, as far as that one is there or can be scrolled in, and up again: the column stays
_ROOM = "\x1bD\x1b[A"
_TO_LINE = "\x1b7\x1b[B\r"
_BACK = "\x1b8"
_ERASE_BELOW = "\x1b[J"


class StatusLine:
    """Control sequences that draw the line and take it away; what is written goes on where it was.

    The cursor has to stand behind the last character, before the last column of the window.
    """

    def __init__(self, text: Callable[[int], str], width: Callable[[], int]) -> None:
        self._text = text
        self._width = width
        self._next = 0.0
        self._last = ""
        self._shown = False
        dim = "NO_COLOR" not in os.environ
        self._styled = ("\x1b[2m", "\x1b[22m") if dim else ("", "")

    def around(self, written: str) -> str:
        """What is to be written, with the line taken away before a line end, and drawn where that is due."""
        before = ""
        if "\n" in written:
            before = self.gone()
        now = time.perf_counter()
        if now >= self._next:
            self._last = self._text(self._width())
            self._next = now + max(_PERIOD_S, (time.perf_counter() - now) / _SHARE)
        elif self._shown:
            return written
        self._shown = True
        start, end = self._styled
        line = f"{_ROOM}{_TO_LINE}{start}{self._last[: self._width()]}{end}\x1b[K{_BACK}"
        return f"{before}{written}{line}"

    def gone(self) -> str:
        """What takes the line away."""
        if not self._shown:
            return ""
        self._shown = False
        return _ERASE_BELOW


def can_draw() -> bool:
    """Whether standard output is a terminal that obeys control sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown") and os.name == "posix"
