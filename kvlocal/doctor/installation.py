"""The installed native library: its files, what it was built for, whether it is ours, and its devices."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kvlocal.errors import KVError
from kvlocal.native import library
from kvlocal.native.spinning import Spinning

_DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # ggml_backend_dev_type
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Library:
    """The native library, None where it cannot be loaded.

    Attributes:
        path: of libllama; binding: version of the Python binding inside the package.
        ours: whether all that is loaded of llama.cpp and ggml lies in our folder.
        kernels: vector code that our page kernels were compiled to.
        spinning: how threads wait for each other.
        system_info: per backend what llama.cpp says it was built with.
    """

    path: str | None = None
    folder: str = ""
    binding: str | None = None
    binding_path: str | None = None
    llama_cpp_commit: str | None = None
    abi: int | None = None
    ours: bool | None = None
    kernels: str | None = None
    spinning: Spinning | None = None
    system_info: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One of ggml's devices; ``kind``: cpu, gpu, igpu, accel or meta."""

    name: str
    description: str
    kind: str
    backend: str
    free_bytes: int
    total_bytes: int


def find_library() -> tuple[Library, str]:
    """The library, and one sentence on what is wrong with it, empty if nothing is."""
    folder = library.installed("lib")
    fault = _probe()
    if fault:
        return Library(folder=str(folder)), fault
    try:
        loaded = library.load()
    except KVError as error:
        return Library(folder=str(folder)), str(error)
    strangers = [path for path in _mapped() if not Path(path).resolve().is_relative_to(folder.resolve())]
    path = Path(loaded.lib._name)
    ours = path.resolve().is_relative_to(folder.resolve()) and not strangers
    if not ours:
        names = ", ".join(strangers) or str(path)
        fault = f"A second llama.cpp is loaded beside the one in {folder}: {names}; import only one of them."
    binding = sys.modules["llama_cpp"]
    info = read_system_info(loaded.llama.llama_print_system_info().decode())
    return (
        Library(
            path=str(path),
            folder=str(folder),
            binding=str(getattr(binding, "__version__", "unknown")),
            binding_path=str(Path(str(binding.__file__)).parent),
            llama_cpp_commit=loaded.commit,
            abi=int(loaded.lib.kvl_abi_version()),
            ours=ours,
            kernels=vector_code(info.get("CPU", {})),
            spinning=loaded.spinning,
            system_info=info,
        ),
        fault,
    )


def _probe() -> str:
    """The result of loading the library in another process, which instructions that this processor lacks would kill."""
    code = "from kvlocal.native.library import load; load()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"Loading the native library takes more than {_PROBE_SECONDS} s."
    except OSError as error:
        return f"The native library cannot be tried in a process of its own: {error.strerror or error}."
    # a failure that Python could tell (1) is told when the library is loaded here
    if done.returncode in (0, 1):
        return ""
    try:
        end = signal.Signals(-done.returncode).name
    except ValueError:
        end = f"code {done.returncode}"
    return (
        f"The native library ends the process that loads it ({end}): it was built for another processor or system; "
        "reinstall kvlocal from its source on this machine."
    )


def _mapped() -> list[str]:
    """Files of llama.cpp and ggml that are loaded in this process, as far as the system tells."""
    process = psutil.Process()
    if not hasattr(process, "memory_maps"):
        return []
    paths = {entry.path for entry in process.memory_maps()}
    names = ("libllama.", "libggml")
    return sorted(path for path in paths if Path(path).name.startswith(names) and Path(path).suffix != ".gguf")


def read_system_info(text: str) -> dict[str, dict[str, str]]:
    """``CPU : AVX = 1 | FMA = 1 | CUDA : ARCHS = 900 |`` as names and values per backend."""
    out: dict[str, dict[str, str]] = {}
    backend = ""
    for item in text.split(" | "):
        head, colon, rest = item.partition(" : ")
        if colon:
            backend, item = head.strip(), rest
        name, equals, value = item.partition(" = ")
        if equals:
            out.setdefault(backend, {})[name.strip()] = value.strip()
    return out


def vector_code(build: dict[str, str]) -> str:
    """Which of their vector types the page kernels were compiled to (kvl-simd.h)."""
    if "AVX512" in build:
        return "AVX-512"
    if {"AVX2", "FMA", "F16C"} <= build.keys():
        return "AVX2"
    return "NEON" if "NEON" in build else "plain loops"


def list_devices() -> list[Device]:
    """The devices that ggml can compute on; the library must load."""
    registry, base = library.open_library("ggml"), library.open_library("ggml-base")
    count, get = registry.ggml_backend_dev_count, registry.ggml_backend_dev_get
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]

    def ask(name: str, kind: Any, *args: Any) -> Any:
        function = getattr(base, name)
        function.restype, function.argtypes = kind, [ctypes.c_void_p, *([ctypes.c_void_p] * (len(args) - 1))]
        return function(*args)

    out = []
    for i in range(count()):
        device, free, total = get(i), ctypes.c_size_t(), ctypes.c_size_t()
        ask("ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total))
        kind = ask("ggml_backend_dev_type", ctypes.c_int, device)
        backend = ask("ggml_backend_dev_backend_reg", ctypes.c_void_p, device)
        out.append(
            Device(
                name=ask("ggml_backend_dev_name", ctypes.c_char_p, device).decode("utf-8", "replace"),
                description=ask("ggml_backend_dev_description", ctypes.c_char_p, device).decode("utf-8", "replace"),
                kind=_DEVICE_KINDS[kind] if kind < len(_DEVICE_KINDS) else str(kind),
                backend=ask("ggml_backend_reg_name", ctypes.c_char_p, backend).decode("utf-8", "replace"),
                free_bytes=free.value,
                total_bytes=total.value,
            )
        )
    return out
