"""The installed native library: its files, what it was built for, and whether it is ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvlocal.errors import KVError
from kvlocal.native import library
from kvlocal.native.devices import read_system_info, vector_code
from kvlocal.native.spinning import Spinning

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
