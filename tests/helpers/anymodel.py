"""A tiny random model of any architecture, made in process: the loader asks for its tensors, and they are filled.

    model = make(arch, tmp_path / "m.gguf")

The file has metadata only. Weights are f32, and depend on the names of the tensors alone.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from arch_table import Arch, common_metadata
from gguf import GGUFWriter

from kvlocal.native import library
from kvlocal.native.model import Model

N_VOCAB = 128
QK_GAIN = 2.0
"""Of queries and keys: attention is not even over all slots then."""


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _Tensor(ctypes.Structure):
    """How ``ggml_tensor`` begins."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a tensor, float32, flat."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape)), np.float32)
    if "attn_q_norm" in name or "attn_k_norm" in name:
        return 0.45 * (1 + 0.1 * x)  # logits of heads of 32 to 64 values get a deviation of about 1.5
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * x
    if "ssm_a" in name:
        return -np.abs(x) - 0.1  # states decay
    if shape[1] > 1:
        return x * np.float32((QK_GAIN if "attn_q" in name or "attn_k" in name else 1.0) / np.sqrt(shape[0]))
    return x if "sinks" in name else 0.1 * x


def write_metadata(arch: Arch, path: Path) -> None:
    writer = GGUFWriter(path, arch.name)
    writer.add_uint32(f"{arch.name}.vocab_size", N_VOCAB)
    for key, value in (common_metadata() | arch.metadata).items():
        name = key if key.startswith("xielu.") else f"{arch.name}.{key}"
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_array(name, value)
    writer.add_string("tokenizer.ggml.model", "test")
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(N_VOCAB)])
    writer.add_array("tokenizer.ggml.scores", [0.0] * N_VOCAB)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


class AnyModel(Model):
    """A model without a file of weights."""

    def __init__(self, handle: Any, path: Path) -> None:
        self.native = library.load()
        self.llama = self.native.llama
        self.path, self.no_alloc = path, False
        self._handle = handle
        self._free = weakref.finalize(self, self.llama.llama_model_free, handle)
        self._vocab = self.llama.llama_model_get_vocab(handle)


def make(arch: Arch, path: Path) -> AnyModel:
    """A model of an architecture; ``path``: where its metadata are written.

    Raises:
        ValueError: llama.cpp does not load it; with what its log says.
    """
    native, base = library.load(), library.open_library("ggml-base")
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    size = ctypes.c_size_t
    base.ggml_backend_tensor_set.restype = None
    base.ggml_backend_tensor_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, size, size]
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    base.gguf_free.restype, base.gguf_free.argtypes = None, [ctypes.c_void_p]

    def fill(tensor: int, _: int | None) -> None:
        shape = tuple(_Tensor.from_address(tensor).ne)
        x = np.ascontiguousarray(values(base.ggml_get_name(tensor).decode(), shape), np.float32)
        base.ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)

    write_metadata(arch, path)
    metadata = base.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    params = native.llama.llama_model_default_params()
    params.load_mtp = True  # else it has no place for these tensors, which no graph of the paged cache uses
    create = native.llama.llama_model_init_from_user
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(fill)
    native.log.clear()
    handle = create(
        ctypes.cast(metadata, create.argtypes[0]),
        ctypes.cast(callback, create.argtypes[1]),
        None,
        params,
    )
    base.gguf_free(metadata)
    if not handle:
        raise ValueError("; ".join(line for line in native.log if "error" in line)[:300] or "no model")
    return AnyModel(handle, path)


def save_file(model: AnyModel, path: Path) -> Path:
    """A file of a model that can be loaded as any other; its vocabulary is for tests of tokens."""
    model.llama.llama_model_save_to_file(model.handle, str(path).encode())
    return path
