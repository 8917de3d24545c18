"""What a forked child may not do: threads do not survive a fork, and whoever waits for them waits for ever."""

from __future__ import annotations

import os

from kvlocal.errors import KVError

_loaded_in = 0
_forked = False


def note_loaded() -> None:
    """The native library is loaded in this process now; children that it forks from here on cannot use it."""
    global _loaded_in
    if not _loaded_in and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)
    _loaded_in = os.getpid()


def _note_fork() -> None:
    global _forked
    _forked = True


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded the library."""
    return _forked


def check_process() -> None:
    """Refuse to compute in a forked child.

    Raises:
        KVError: the library was loaded in the process that this one was forked from.
    """
    if _forked:
        raise KVError(
            f"The native library was loaded in another process ({_loaded_in}) and cannot be used after a fork; start "
            'workers with multiprocessing\'s "spawn", or load kvlocal in the worker only.'
        )
