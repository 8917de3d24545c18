"""What happens in a forked child of the tests' own process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

TIMEOUT_S = 30


def forked(action: Callable[[], object]) -> str:
    """``Type: message`` of what ``action`` raises in a forked child, ``"done"`` if it raises nothing.

    Raises:
        AssertionError: the child does not come to an end.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            said = "done"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)  # what the parent opened is the parent's to close
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], TIMEOUT_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert ready, f"the child hangs for {TIMEOUT_S} s"
        return os.read(read, 10_000).decode()
    finally:
        os.close(read)
