"""How long threads spin for each other before they sleep.

The threads of a graph wait for each other after every operator. Those of OpenMP spin for milliseconds by default, which
on a machine that does something else as well takes the processor from the very thread that is waited for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SPINS = 1000
"""Rounds that a thread of GNU's OpenMP spins before it sleeps: about as long as a small operator takes."""

POLL = 0
"""Of ggml's own threads, where it was built without OpenMP: they sleep between two graphs."""

_VARIABLE = "GOMP_SPINCOUNT"
_WAITING = "OMP_WAIT_POLICY"
_MAPS = Path("/proc/self/maps")

Source = Literal["kvlocal", "environment", "earlier", "other", "own"]


@dataclass(frozen=True)
class Spinning:
    """How threads wait.

    Attributes:
        source: ``kvlocal``: as set here; ``environment``: as the user set it; ``earlier``: the OpenMP library had been
            loaded by something else before, with settings of its own; ``other``: an OpenMP library that takes none of
            these settings; ``own``: ggml's own threads, without OpenMP.
        setting: the variable and its value, or what stands in their place; empty where none has an effect.
        runtime: path of the OpenMP library, empty if there is none or the system does not tell.
    """

    source: Source
    setting: str = ""
    runtime: str = ""


@dataclass
class Loading:
    """What was there while the native library was loaded: the user's own setting, OpenMP libraries before and after."""

    asked: str
    before: list[str]
    after: list[str]

    def judge(self, openmp: bool) -> Spinning:
        """How threads wait now; ``openmp``: whether the native library was built with it."""
        if not openmp:
            return Spinning("own", f"poll={POLL}")
        new = [path for path in self.after if path not in self.before]
        # one that was not there before was loaded for us; without such a one, ours is among those that were
        runtime = next(iter(new or self.before), "")
        gnu = not runtime or Path(runtime).name.lower().startswith("libgomp")
        if self.asked:
            return Spinning("environment", self.asked, runtime)
        if runtime and not new:
            return Spinning("earlier", "", runtime)
        if not gnu or (not runtime and not _MAPS.exists()):
            return Spinning("other", "", runtime)
        return Spinning("kvlocal", f"{_VARIABLE}={SPINS}", runtime)


@contextmanager
def short_spins() -> Iterator[Loading]:
    """Load the native library in this context: GNU's OpenMP library reads the variable while it is loaded, and only
    then.

    What the user set stays as it is, and nothing stays in the environment for children to inherit.
    """
    given = os.environ.get(_VARIABLE)
    asked = next((f"{name}={os.environ[name]}" for name in (_VARIABLE, _WAITING) if os.environ.get(name)), "")
    loading = Loading(asked, _runtimes(), [])
    if not asked:
        os.environ[_VARIABLE] = str(SPINS)
    try:
        yield loading
    finally:
        if not asked:
            del os.environ[_VARIABLE]
            if given is not None:  # empty, which is as good as unset
                os.environ[_VARIABLE] = given
        loading.after = _runtimes()


def _runtimes() -> list[str]:
    """OpenMP libraries that are loaded in this process, as far as the system tells."""
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    paths = {fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6}
    return sorted(path for path in paths if Path(path).name.lower().startswith(("libgomp", "libomp", "libiomp")))


class _PoolParams(ctypes.Structure):
    """``ggml_threadpool_params``."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class SleepingPool:
    """ggml's own threads for one context, asleep while no graph is computed; only for a library without OpenMP.

    Args:
        base, cpu: the libraries ``ggml-base`` and ``ggml-cpu``; llama: ``libllama``.
        context: the llama_context that computes with them.
        n_threads: at least 1, the calling thread among them.
    """

    def __init__(self, base: Any, cpu: Any, llama: Any, context: Any, n_threads: int) -> None:
        self._cpu, self._llama, self._context = cpu, llama, context
        params = _PoolParams()
        base.ggml_threadpool_params_init.argtypes = [ctypes.POINTER(_PoolParams), ctypes.c_int]
        base.ggml_threadpool_params_init.restype = None
        base.ggml_threadpool_params_init(ctypes.byref(params), n_threads)
        params.poll = POLL
        cpu.ggml_threadpool_new.argtypes = [ctypes.POINTER(_PoolParams)]
        cpu.ggml_threadpool_new.restype = ctypes.c_void_p
        cpu.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
        cpu.ggml_threadpool_free.restype = None
        llama.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
        llama.llama_attach_threadpool.restype = None
        llama.llama_detach_threadpool.argtypes = [ctypes.c_void_p]
        llama.llama_detach_threadpool.restype = None
        self._pool = cpu.ggml_threadpool_new(ctypes.byref(params))
        if self._pool:
            llama.llama_attach_threadpool(context, self._pool, None)

    @property
    def closed(self) -> bool:
        return not self._pool

    def close(self) -> None:
        """End the threads; call it before the context is freed."""
        if self._pool:
            self._llama.llama_detach_threadpool(self._context)
            self._cpu.ggml_threadpool_free(self._pool)
            self._pool = None
