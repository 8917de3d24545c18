"""Keys that are pressed while an answer is written: they do not show in it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

try:
    import termios
except ImportError:  # Windows: its consoles show keys only while they are read
    termios = None  # type: ignore[assignment]


class NoEcho:
    """For a `with` block: the terminal does not show what is typed. It is as before afterwards, and while stopped."""

    def __init__(self, *, discard: bool, on_stop: Callable[[], None] = lambda: None) -> None:
        """`discard`: forget what was typed, at the end. `on_stop`: called before Ctrl-Z stops the process."""
        self._discard = discard
        self._on_stop = on_stop
        self._fd = -1
        self._saved: list[Any] | None = None
        self._stop_handler: Any = None

    def __enter__(self) -> NoEcho:
        self._hide()
        hidden = self._saved is not None and threading.current_thread() is threading.main_thread()
        if hidden and signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:
            self._stop_handler = signal.signal(signal.SIGTSTP, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop_handler is not None:
            signal.signal(signal.SIGTSTP, self._stop_handler)
        self._show()

    def _hide(self) -> None:
        if termios is None:
            return
        try:
            fd = sys.stdin.fileno()
            # a job in the background would be stopped if it set the terminal
            if not os.isatty(fd) or os.tcgetpgrp(fd) != os.getpgrp():
                return
            saved = termios.tcgetattr(fd)
            attributes = [*saved[:3], saved[3] & ~termios.ECHO, *saved[4:]]
            termios.tcsetattr(fd, termios.TCSANOW, attributes)
        except (AttributeError, OSError, ValueError, termios.error):
            return  # no standard input, or no terminal any more
        self._fd, self._saved = fd, saved

    def _show(self) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # the terminal may be gone
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return  # the shell has set it as it likes it
            if self._discard:
                termios.tcflush(self._fd, termios.TCIFLUSH)
            termios.tcsetattr(self._fd, termios.TCSANOW, saved)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        discard, self._discard = self._discard, False
        self._on_stop()
        self._show()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # here it goes on, in the foreground or not
        signal.signal(number, self._stop)
        self._discard = discard
        self._hide()
