"""The native library: finding it, checking that it is ours, and the functions of ``kvl.h`` as ctypes.

The libraries and the binding of the same llama.cpp are installed inside this package, so that a llama-cpp-python that
the user has installed neither helps nor hinders.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from collections import deque
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

from kvlocal.errors import KVError, UsageError
from kvlocal.native.fork import check_process, note_loaded
from kvlocal.native.spinning import short_spins
from kvlocal.native.structs import (
    KvlArchiveStats,
    KvlBreakdown,
    KvlLayerInfo,
    KvlParams,
    KvlRetrieval,
    KvlRetrievalStats,
    KvlSeqStats,
    KvlStats,
)

ABI_VERSION = 11
ERR_ARGUMENT, ERR_UNSUPPORTED, ERR_MEMORY, ERR_COMPUTE = -1, -2, -3, -4

_REINSTALL = "reinstall kvlocal with `pip install --force-reinstall .` from its source"


LIB_DIR = "KVLOCAL_LIB_DIR"
"""The environment's name of the folder with another build of the libraries, of the same source."""


def installed(part: str) -> Path:
    """Where ``part`` ("lib", "binding") of the package is; an editable install keeps it apart from the code.

    The environment's KVLOCAL_LIB_DIR names another folder of libraries.
    """
    if part == "lib" and os.environ.get(LIB_DIR):
        return Path(os.environ[LIB_DIR]).expanduser().resolve()
    beside = Path(__file__).parents[1] / part
    if beside.exists():
        return beside
    try:
        return Path(str(distribution("kvlocal").locate_file(f"kvlocal/{part}")))
    except PackageNotFoundError:
        return beside


def _import_binding() -> ModuleType:
    """``llama_cpp.llama_cpp`` over our library, whatever else is installed under that name."""
    lib_dir, binding = installed("lib"), installed("binding")
    if os.environ.get(LIB_DIR) and not any(lib_dir.glob("*llama.*")):
        raise KVError(
            f"{LIB_DIR} names {lib_dir}, where no libllama is: correct it, or unset it for the usual library."
        )
    if not lib_dir.is_dir() or not binding.is_dir():
        raise KVError(f"The native library of kvlocal is not installed (looked in {lib_dir}): {_REINSTALL}.")
    if "llama_cpp" not in sys.modules:
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        os.environ["LLAMA_CPP_LIB_PATH"] = str(lib_dir)
        sys.path.insert(0, str(binding))
        try:
            return importlib.import_module("llama_cpp.llama_cpp")
        except (OSError, RuntimeError, AttributeError) as error:
            raise KVError(f"The native library of kvlocal cannot be loaded ({error}): {_REINSTALL}.") from error
        finally:
            sys.path.remove(str(binding))
            if before is None:
                del os.environ["LLAMA_CPP_LIB_PATH"]
            else:
                os.environ["LLAMA_CPP_LIB_PATH"] = before
    return importlib.import_module("llama_cpp.llama_cpp")


def _declare(lib: Any) -> None:
    """Argument and result types of every function of ``kvl.h``."""
    i32, i64, ptr, text = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    ints, floats = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
    binding = sys.modules["llama_cpp.llama_cpp"]
    functions: dict[str, tuple[Any, list[Any]]] = {
        "kvl_abi_version": (i32, []),
        "kvl_llama_commit": (text, []),
        "kvl_last_error": (text, []),
        "kvl_struct_size": (ctypes.c_size_t, [text]),
        "kvl_has_kernels": (i32, [ptr]),
        "kvl_default_params": (KvlParams, []),
        "kvl_model_check": (i32, [ptr]),
        "kvl_format_check": (i32, [ptr, i32]),
        "kvl_load_model": (ptr, [ctypes.c_char_p, binding.llama_model_params]),
        "kvl_init_from_model": (ptr, [ptr, binding.llama_context_params, ctypes.POINTER(KvlParams)]),
        "kvl_is_paged": (ctypes.c_bool, [ptr]),
        "kvl_n_layer": (i32, [ptr]),
        "kvl_get_layer": (i32, [ptr, i32, ctypes.POINTER(KvlLayerInfo)]),
        "kvl_decode": (i32, [ptr, binding.llama_batch]),
        "kvl_slots": (i32, [ptr, i32, i32, ints, i64, ints, ints, ints]),
        "kvl_window_scores": (i32, [ptr, i32, i32, i32, i32, floats, i64]),
        "kvl_set_mass": (i32, [ptr, i32]),
        "kvl_slot_mass": (i32, [ptr, i32, i32, floats, i64, ctypes.c_bool]),
        "kvl_read_kv": (i32, [ptr, i32, i32, i32, floats, floats]),
        "kvl_value_norms": (i32, [ptr, i32, i32, floats]),
        "kvl_read_queries": (i32, [ptr, i32, i32, i32, floats]),
        "kvl_keep": (i32, [ptr, i32, i32, ints, ints]),
        "kvl_demote": (i32, [ptr, i32, i32, i32, ints, ints, i32, i32]),
        "kvl_set_mean": (i32, [ptr, i32, i32, floats, i32, i32, i32]),
        "kvl_select": (i32, [ptr, i32, i32, ints, ints]),
        "kvl_retrieve": (
            i32,
            [ptr, i32, ctypes.POINTER(KvlRetrieval), ints, i32, ctypes.POINTER(KvlRetrievalStats)],
        ),
        "kvl_archive_to": (i32, [ptr, i32, text, i32]),
        "kvl_save_archive": (i32, [ptr, i32, text, text]),
        "kvl_load_archive": (i32, [ptr, i32, text, text, ctypes.POINTER(i64), i32]),
        "kvl_archive_table": (i32, [ptr, i32, ctypes.POINTER(i64), i32]),
        "kvl_get_archive": (i32, [ptr, i32, ctypes.POINTER(KvlArchiveStats)]),
        "kvl_branch": (i32, [ptr, i32, i32]),
        "kvl_rotate": (i32, [ptr, i32, i32, floats, ints]),
        "kvl_roll": (i32, [ptr, i32]),
        "kvl_truncate": (i32, [ptr, i32, i32]),
        "kvl_mark": (i32, [ptr, i32]),
        "kvl_reach": (i32, [ptr, i32, i32]),
        "kvl_get_stats": (
            i32,
            [ptr, ctypes.POINTER(KvlStats), i32, ctypes.POINTER(KvlSeqStats), *[ctypes.POINTER(KvlBreakdown)] * 2],
        ),
        "kvl_trim": (i32, [ptr]),
        "kvl_reset_peak": (i32, [ptr]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments


class Native:
    """The loaded library: ``llama`` is the binding's low-level module, ``lib`` has the ``kvl_*`` functions."""

    def __init__(self) -> None:
        with short_spins() as loading:
            self.llama = _import_binding()
        note_loaded()
        self.lib = self.llama._lib
        if not hasattr(self.lib, "kvl_abi_version"):
            raise KVError(
                "A stock libllama was loaded instead of kvlocal's own: import kvlocal before llama_cpp, and unset "
                "LLAMA_CPP_LIB_PATH."
            )
        _declare(self.lib)
        self._check()
        self.log: deque[str] = deque(maxlen=50)
        self._log_callback = self.llama.llama_log_callback(self._on_log)
        self.llama.llama_log_set(self._log_callback, None)
        self.llama.llama_backend_init()
        self.openmp = "OPENMP = 1" in self.llama.llama_print_system_info().decode()
        self.spinning = loading.judge(self.openmp)

    def _check(self) -> None:
        """The library is of this version and lays out its structs as we do."""
        abi = self.lib.kvl_abi_version()
        if abi != ABI_VERSION:
            raise KVError(f"The native library has ABI version {abi}, this package needs {ABI_VERSION}: {_REINSTALL}.")
        mirrored = {
            "kvl_params": KvlParams,
            "kvl_stats": KvlStats,
            "kvl_seq_stats": KvlSeqStats,
            "kvl_layer_info": KvlLayerInfo,
            "kvl_breakdown": KvlBreakdown,
            "kvl_archive_stats": KvlArchiveStats,
            "kvl_retrieval": KvlRetrieval,
            "kvl_retrieval_stats": KvlRetrievalStats,
            "llama_context_params": self.llama.llama_context_params,
            "llama_model_params": self.llama.llama_model_params,
            "llama_batch": self.llama.llama_batch,
        }
        for name, struct in mirrored.items():
            theirs, ours = self.lib.kvl_struct_size(name.encode()), ctypes.sizeof(struct)
            if theirs != ours:
                raise KVError(f"struct {name} has {theirs} bytes in the library and {ours} here: {_REINSTALL}.")

    def _on_log(self, level: int, text: bytes, user_data: Any) -> None:
        # levels 3 and 4 are warning and error, 5 continues the line before
        if level in (3, 4):
            self.log.append(text.decode("utf-8", "replace").strip())

    @property
    def commit(self) -> str:
        return str(self.lib.kvl_llama_commit().decode())

    def last_error(self) -> str:
        return str(self.lib.kvl_last_error().decode("utf-8", "replace"))

    def check(self, status: int) -> int:
        """``status`` if it is not negative, else the error it stands for."""
        if status >= 0:
            return status
        what = self.last_error() or f"the native library failed with status {status}"
        raise (UsageError if status == ERR_UNSUPPORTED else KVError)(what[0].upper() + what[1:] + ".")


def load() -> Native:
    """The native library, loaded once per process.

    Raises:
        KVError: it is not installed, not ours, or was loaded before this process was forked.
    """
    check_process()
    return _load()


@functools.cache
def _load() -> Native:
    return Native()


def open_library(name: str) -> Any:
    """The installed library of this name, such as ``ggml-base``, as :func:`load` loaded it; functions are undeclared.

    Raises:
        KVError: there is none.
    """
    load()
    folder = installed("lib")
    for path in folder.iterdir():
        if path.stem.removeprefix("lib") == name:
            return ctypes.CDLL(str(path))
    raise KVError(f"There is no library {name} in {folder}: {_REINSTALL}.")


def build_info() -> dict[str, str | int]:
    """``llama_cpp_commit`` and ``abi_version`` of the library that is installed."""
    native = load()
    return {"llama_cpp_commit": native.commit, "abi_version": native.lib.kvl_abi_version()}
