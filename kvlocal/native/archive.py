"""What sequences of a paged cache keep on disk."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from kvlocal.native.calls import CacheCalls
from kvlocal.native.retrieval import ARCHIVE_FORMATS, Archived, ArchiveFormat
from kvlocal.native.structs import KvlArchiveStats


def _longs(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))


class Archives(CacheCalls):
    """A part of :class:`~kvlocal.native.cache.PagedCache`."""

    def archive_to(self, seq: int, folder: Path, storage: ArchiveFormat = "f16") -> None:
        """Write the units of a sequence to a nameless file in ``folder`` from now on, exact, when they close. Nothing
        is evicted or demoted before it is written."""
        kind = ARCHIVE_FORMATS.index(storage)
        self._check(self._lib.kvl_archive_to(self._ctx, seq, os.fsencode(folder), kind))

    def save_archive(self, seq: int, path: Path, tag: str) -> bool:
        """Write a sequence's archive to the file beside its session: a new one, or what is not yet in the one that it
        was saved to or loaded from; ``tag``: 32 characters that :meth:`load_archive` must be given.

        Returns:
            ``False`` if somebody else has added to that file; nothing has changed.
        """
        return bool(self._check(self._lib.kvl_save_archive(self._ctx, seq, os.fsencode(path), tag.encode())))

    def archive_table(self, seq: int) -> np.ndarray:
        """Of every unit its first token, the one behind its last, and where it lies (-1: lost), int64 ``[n, 3]``."""
        out = np.empty((self._check(self._lib.kvl_archive_table(self._ctx, seq, None, 0)), 3), np.int64)
        self._check(self._lib.kvl_archive_table(self._ctx, seq, _longs(out), len(out)))
        return out

    def load_archive(self, seq: int, path: Path, tag: str, table: np.ndarray) -> None:
        """Take a saved archive for a sequence that was restored since :meth:`archive_to`; ``table``: what
        :meth:`archive_table` was when it was saved.

        Raises:
            KVError: it is damaged or of another session; nothing has changed.
        """
        table = np.ascontiguousarray(table, np.int64)
        name = os.fsencode(path)
        self._check(self._lib.kvl_load_archive(self._ctx, seq, name, tag.encode(), _longs(table), len(table)))

    def archived(self, seq: int) -> Archived:
        out = KvlArchiveStats()
        self._check(self._lib.kvl_get_archive(self._ctx, seq, ctypes.byref(out)))
        return Archived(out.n_units, out.n_lost, out.bytes, out.error.decode("utf-8", "replace"))
