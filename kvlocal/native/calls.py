"""Calls of the library about one paged cache."""

from __future__ import annotations

from typing import Any

from kvlocal.errors import KVError
from kvlocal.native import library
from kvlocal.native.fork import check_process


class CacheCalls:
    """The context that a cache belongs to, as long as it is open."""

    def __init__(self, ctx: Any) -> None:
        self._native = library.load()
        self._handle = ctx

    @property
    def _lib(self) -> Any:
        check_process()
        return self._native.lib

    def close(self) -> None:
        """Its context is gone: every method raises from now on."""
        self._handle = None

    @property
    def _ctx(self) -> Any:
        if self._handle is None:
            raise KVError("The cache was closed with its model; load the model again to go on.")
        return self._handle

    def _check(self, status: int) -> int:
        return self._native.check(status)
