"""Standard streams that are closed when the command starts."""

from __future__ import annotations

import io
import os
import sys

from kvlocal.errors import KVError


class ClosedOutput(io.TextIOBase):
    """Stands for a standard output that was closed: an error for those who write, not for others."""

    def write(self, _text: str) -> int:
        raise KVError("Standard output is closed, so nothing can be written to it; open it, or redirect it to a file.")

    def writable(self) -> bool:
        return True


def open_standard_streams() -> None:
    """Make 0, 1 and 2 name something: a file opened later would get their numbers, and logs would go into it."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            break
    if sys.stdout is None:
        sys.stdout = ClosedOutput()
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
