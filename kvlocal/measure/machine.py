"""The machine of a measurement: its processor, its cores, and how fast they read memory."""

from __future__ import annotations

import importlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from kvlocal.native.threads import usable_cores

_MIN_BYTES = 512 << 20
_REPEATS = 5

_X86 = {  # llama.cpp's name: Linux's, numpy's
    "SSE3": ("pni", "SSE3"),
    "SSSE3": ("ssse3", "SSSE3"),
    "AVX": ("avx", "AVX"),
    "AVX2": ("avx2", "AVX2"),
    "F16C": ("f16c", "F16C"),
    "FMA": ("fma", "FMA3"),
    "BMI2": ("bmi2", "BMI2"),
    "AVX_VNNI": ("avx_vnni", ""),
    "AVX512": ("avx512f", "AVX512F"),
    "AVX512_VBMI": ("avx512vbmi", "AVX512VBMI"),
    "AVX512_VNNI": ("avx512_vnni", "AVX512VNNI"),
    "AVX512_BF16": ("avx512_bf16", "AVX512BF16"),
    "AMX_INT8": ("amx_int8", ""),
}
_ARM = {
    "NEON": ("asimd", "ASIMD"),
    "ARM_FMA": ("asimd", "ASIMD"),
    "FP16_VA": ("asimdhp", "ASIMDHP"),
    "DOTPROD": ("asimddp", "ASIMDDP"),
    "MATMUL_INT8": ("i8mm", ""),
    "SVE": ("sve", "SVE"),
    "SME": ("sme", ""),
}


@dataclass(frozen=True)
class Machine:
    """Name of the processor, physical cores this process may use, threads that ran, memory bandwidth of those."""

    cpu: str
    cores: int
    threads: int
    read_bytes_per_s: float


def describe_machine(n_threads: int = 0) -> Machine:
    """The machine, its bandwidth measured now (about a second) with ``n_threads`` threads (0: the default)."""
    usable = usable_cores()
    threads = n_threads or usable.threads
    return Machine(cpu_name(), usable.physical, threads, read_bandwidth(threads))


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as it gives it itself, else its architecture."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Which instruction sets the processor has, by the names that llama.cpp gives them; unknown ones are left out.

    From Linux itself; elsewhere from numpy, which looks for fewer. Empty when neither knows.
    """
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        known = {"flags": _X86, "features": _ARM}.get(key.strip().lower())
        if known is not None:
            found = value.split()
            return {name: linux in found for name, (linux, _) in known.items()}
    known = _X86 if platform.machine().lower() in ("x86_64", "amd64") else _ARM
    has = _numpy_features()
    return {name: has[numpy] for name, (_, numpy) in known.items() if numpy in has}


def _numpy_features() -> dict[str, bool]:
    # where numpy keeps what np.show_runtime() prints
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            return dict(importlib.import_module(module).__cpu_features__)
        except (ImportError, AttributeError):
            continue
    return {}


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the first core reads through; 0 when unknown."""
    sizes = [0]
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdecimal():
            sizes.append(int(number) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 1))
    return max(sizes)


def read_bandwidth(n_threads: int, n_bytes: int = 0) -> float:
    """Bytes per second that ``n_threads`` threads read from memory together: the upper limit on decoding speed.

    One array, far larger than the caches (512 MiB, or 8 times the last-level cache; at most a quarter of the free
    memory), is filled, so that its pages exist, and cut into one slice per thread. Every thread takes the maximum of
    its slice of int32: a vectorised reduction that releases the interpreter lock and computes less than it loads. The
    fastest of five passes counts.

    Args:
        n_threads: at least 1.
        n_bytes: size of the array, 0 for the one above.
    """
    size = n_bytes or min(max(_MIN_BYTES, 8 * last_level_cache_bytes()), psutil.virtual_memory().available // 4)
    parts = np.array_split(np.empty(max(size // 4, n_threads), np.int32), n_threads)
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))
        for _ in range(_REPEATS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best
