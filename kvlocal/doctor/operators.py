"""Single operators of ggml over numpy data, without a model: the page kernels' and llama.cpp's own."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.native import library
from kvlocal.native.fork import check_process

PREC_F32 = 10  # GGML_PREC_F32
_TYPES = {"float32": 0, "float16": 1, "int8": 24, "int32": 26}  # GGML_TYPE_*
_F32, _ALL_THREADS = 0, -1


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def libraries() -> tuple[Any, Any]:
    """ggml-base and ggml-cpu, as loaded by :func:`kvlocal.native.library.load`."""
    base, cpu = library.open_library("ggml-base"), library.open_library("ggml-cpu")
    ptr, i64, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    functions: tuple[tuple[Any, str, Any, list[Any]], ...] = (
        (base, "ggml_init", ptr, [_InitParams]),
        (base, "ggml_free", None, [ptr]),
        (base, "ggml_new_tensor_4d", ptr, [ptr, ctypes.c_int, i64, i64, i64, i64]),
        (base, "ggml_get_data", ptr, [ptr]),
        (
            base,
            "ggml_custom_4d",
            ptr,
            [ptr, ctypes.c_int, i64, i64, i64, i64, ptr, ctypes.c_int, ptr, ctypes.c_int, ptr],
        ),
        (base, "ggml_custom_inplace", ptr, [ptr, ptr, ptr, ctypes.c_int, ptr, ctypes.c_int, ptr]),
        (base, "ggml_flash_attn_ext", ptr, [ptr, ptr, ptr, ptr, ptr, real, real, real]),
        (base, "ggml_flash_attn_ext_set_prec", None, [ptr, ctypes.c_int]),
        (base, "ggml_new_graph", ptr, [ptr]),
        (base, "ggml_build_forward_expand", None, [ptr, ptr]),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [ptr, ptr, ctypes.c_int]),
        (cpu, "kvl_set_op_params", None, [ptr, ptr, ctypes.c_size_t]),
        (cpu, "kvl_rows_encode", None, [ctypes.c_int, ptr, ctypes.c_int, ctypes.c_int, ptr]),
        (cpu, "kvl_rows_decode", None, [ctypes.c_int, ptr, *[ctypes.c_int] * 3, ptr, ctypes.c_int]),
        (cpu, "kvl_row_decode_ref", None, [ctypes.c_int, ptr, ctypes.c_int, ptr]),
    )
    for where, name, result, arguments in functions:
        function = getattr(where, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu


class Graph:
    """A ggml graph over numpy data, in memory of its own."""

    def __init__(self, n_bytes: int) -> None:
        self.base, self.cpu = libraries()
        self.ctx = self.base.ggml_init(_InitParams(n_bytes + (16 << 20), None, False))
        self.graph = self.base.ggml_new_graph(self.ctx)

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """A tensor that holds ``array``; its shape is that of the array, last axis first."""
        kind = _TYPES[array.dtype.name]
        data = np.ascontiguousarray(array)
        shape = [*array.shape[::-1], 1, 1, 1][:4]
        tensor = self.base.ggml_new_tensor_4d(self.ctx, kind, *shape)
        ctypes.memmove(self.base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
        return tensor

    def custom(self, name: str, args: Sequence[Any], params: ctypes.Structure, *shape: int) -> Any:
        """An operator of the page kernels with its launch scalars; float32 of ``shape``."""
        shape4 = [*shape, 1, 1, 1][:4]
        array = (ctypes.c_void_p * len(args))(*args)
        function = ctypes.cast(getattr(self.cpu, name), ctypes.c_void_p)
        op = self.base.ggml_custom_4d(self.ctx, _F32, *shape4, array, len(args), function, _ALL_THREADS, None)
        self.cpu.kvl_set_op_params(op, ctypes.addressof(params), ctypes.sizeof(params))
        return op

    def change(self, name: str, target: Any, args: Sequence[Any], params: ctypes.Structure) -> Any:
        """An operator that writes into ``target``; the result is a view of it."""
        array = (ctypes.c_void_p * len(args))(*args)
        function = ctypes.cast(getattr(self.cpu, name), ctypes.c_void_p)
        op = self.base.ggml_custom_inplace(self.ctx, target, array, len(args), function, _ALL_THREADS, None)
        self.cpu.kvl_set_op_params(op, ctypes.addressof(params), ctypes.sizeof(params))
        return op

    def run(self, n_threads: int, *results: Any) -> None:
        check_process()
        for result in results:
            self.base.ggml_build_forward_expand(self.graph, result)
        status = self.cpu.ggml_graph_compute_with_ctx(self.ctx, self.graph, n_threads)
        assert status == 0, f"the graph failed with status {status}"

    def read(self, tensor: Any, *shape: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The values of a tensor, of which ``shape`` is that of an array: last axis first."""
        out = np.empty(shape, dtype)
        ctypes.memmove(out.ctypes.data, self.base.ggml_get_data(tensor), out.nbytes)
        return out

    def close(self) -> None:
        self.base.ggml_free(self.ctx)
