"""Ctrl-C, SIGTERM and SIGHUP as requests that are obeyed where nothing is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # the exit code of a shell's command that Ctrl-C ended

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(SystemExit):
    """SIGTERM or SIGHUP; a SystemExit, because event loops hand on no other exception of ours."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Interrupt:
    """Signals as requests: noted when they come, obeyed between two steps.

    An exception in the middle of a decode step could leave the cache and the list of its tokens out of step, one in the
    middle of a save would lose what is saved.

    Attributes:
        requested: whether a signal came.
        number: which one; SIGTERM and SIGHUP before SIGINT.
    """

    def __init__(self, *, raise_from: int = 2) -> None:
        """`raise_from`: the signal that does not wait for the end of a step; 0: none."""
        self.requested = False
        self.number: int = signal.SIGINT
        self._raise_from = raise_from
        self._count = 0
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """As a shell has it for a command that a signal ended."""
        return 128 + self.number

    @property
    def ending(self) -> bool:
        """Whether the process is to end, not only what it does now."""
        return self.requested and self.number != signal.SIGINT

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # what was ignored stays so: SIGHUP under nohup
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt or Ended if a signal came."""
        if self.requested:
            raise self._error()

    def clear(self) -> None:
        """Forget Ctrl-C: what it was meant for has ended."""
        if not self.ending:
            self.requested = False
            self._count = 0

    def raising_from(self, count: int) -> _Mode:
        """For a `with` block: the signal that raises at once in it; 0: none."""
        return _Mode(self, count)

    def _error(self) -> BaseException:
        return KeyboardInterrupt() if self.number == signal.SIGINT else Ended(self.number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self.requested = True
        if number != signal.SIGINT:
            self.number = number
        if self._raise_from and self._count >= self._raise_from:
            self._raise_from = 0  # one is enough: what is done about it is not to be interrupted
            raise self._error()


class _Mode:
    def __init__(self, interrupt: Interrupt, count: int) -> None:
        self._interrupt = interrupt
        self._count = count
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._interrupt._raise_from
        if self._count == 1:
            self._interrupt.check()
        self._interrupt._raise_from = self._count

    def __exit__(self, *_: object) -> None:
        self._interrupt._raise_from = self._before
