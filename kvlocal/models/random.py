"""GGUF files with random weights in the shape of real models: for measuring speed, where contents do not matter.

    path = random_model("llama-1b")

Blocks are written as they are stored, random bits under a fixed scale, without ever holding the weights as floats. The
types are those that llama.cpp's quantizer chooses for "Q4_0": Q4_0 for the
matrices, Q6_K for the output matrix (which is the token embedding where both are one), F32 for vectors.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from kvlocal.errors import KVError, UsageError
from kvlocal.models.folder import models_dir

Bytes = npt.NDArray[np.uint8]

_VERSION = 1  # part of the file's name: raise it when the same shape gives other bytes
_SPECIALS = ("<unk>", "<s>", "</s>")
_N_BYTES = 256
_BIAS_STD = 0.1
# Root mean square of a Q4_0 weight under scale 1 (-8..7) and of a Q6_K weight under scales 1 (-32..31).
_Q4_RMS, _Q6_RMS = math.sqrt(21.5), math.sqrt(341.5)
_Q6_SUBSCALE = 8


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of one model.

    Attributes:
        arch: ``llama``, or ``qwen2`` (which has biases on Q, K and V).
        n_layer: layers written, which may be fewer than the real model has: the cost per layer is the same.
        head_dim: size of a head's query, key and value; ``n_head * head_dim`` need not be ``n_embd``.
        rope_base: base of the rotation's frequencies; n_ctx: context trained for, tokens.
        tied: whether the output matrix is the token embedding.
    """

    name: str
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    rope_base: float
    n_ctx: int
    tied: bool
    rms_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.arch not in ("llama", "qwen2"):
            raise ValueError(f"arch is {self.arch!r}; it must be llama or qwen2")
        if self.n_embd % 256 or self.n_ff % 32 or (self.n_head * self.head_dim) % 32:
            raise ValueError("blocks do not fit: n_embd must be a multiple of 256, n_ff and n_head * head_dim of 32")
        if self.n_vocab <= len(_SPECIALS) + _N_BYTES:
            raise ValueError(f"n_vocab is {self.n_vocab}; it must exceed {len(_SPECIALS) + _N_BYTES}")


@dataclass(frozen=True)
class OffsetShape(Shape):
    """A qwen2 shape with keys that lie far from zero in a few channels, as the biases of some trained models have it.

    Source: profile ``bias`` (spec: quant, section 3.3). In every KV head eight channels get a bias of either sign: six
    whose pairs turn most slowly of 1/3 to 1 times ``offset``, two whose pairs turn at middle speed of 1/9 to 2/9 of it.
    The standard deviation of a key's channel over the tokens is about 1.

    Attributes:
        offset: largest bias of a key's channel.
    """

    offset: float = 90.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch != "qwen2" or self.head_dim % 64:
            raise ValueError("offsets need arch qwen2, which has biases, and a head_dim that is a multiple of 64")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, 500000.0, 131072, tied=True),
        Shape("llama-8b-2l", "llama", 2, 4096, 32, 8, 128, 14336, 128256, 500000.0, 8192, tied=False),
        Shape("qwen-3b-4l", "qwen2", 4, 2048, 16, 2, 128, 11008, 151936, 1000000.0, 32768, tied=True, rms_eps=1e-6),
    )
}
"""Llama 3.2 1B whole, 2 of the 32 layers of Llama 3 8B, 4 of the 36 layers of Qwen 2.5 3B."""


def random_model(name: str) -> Path:
    """The file of one of :data:`SHAPES`, beside the fetched models; written if it is not there.

    Raises:
        UsageError: there is no such shape.
        KVError: the file cannot be written.
    """
    if name not in SHAPES:
        raise UsageError(f"There is no random model {name!r}; there are {', '.join(SHAPES)}.")
    shape = SHAPES[name]
    digest = hashlib.sha256(f"{_VERSION} {shape}".encode()).hexdigest()[:8]
    path = models_dir() / f"random-{name}-{digest}.gguf"
    return path if path.is_file() else write_random_model(shape, path)


def write_random_model(shape: Shape, path: Path) -> Path:
    """Write a model of this shape; the same shape always gives the same bytes.

    Weights have zero mean and a standard deviation of ``1 / sqrt(n_in)``: activations, attention logits and output
    logits keep about unit variance. The file appears under its name only when it is complete.

    Raises:
        KVError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the directory of the target: a rename is atomic only within one file system
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
            temp = Path(scratch) / path.name
            _write(shape, temp)
            temp.replace(path)
    except OSError as error:
        raise KVError(
            f"The random model {shape.name} cannot be written to {path.parent}: {error.strerror or error}; "
            "KVLOCAL_CACHE names another directory."
        ) from error
    return path


@dataclass(frozen=True)
class _Tensor:
    """Name, shape with the outer dimension first, how it is stored; ``keys_of``: which offsets a bias of keys has."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    keys_of: OffsetShape | None = None

    def make(self) -> np.ndarray:
        """The values, as stored."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        if self.kind == GGMLQuantizationType.F32:
            if self.name.endswith(".bias"):
                bias = rng.standard_normal(self.shape, dtype=np.float32) * np.float32(_BIAS_STD)
                return bias if self.keys_of is None else _with_offsets(bias, self.keys_of, rng)
            return np.ones(self.shape, np.float32)
        n_out, n_in = self.shape
        if self.kind == GGMLQuantizationType.Q4_0:
            return q4_0(rng, n_out, n_in)
        return q6_k(rng, n_out, n_in)


def _with_offsets(bias: np.ndarray, shape: OffsetShape, rng: np.random.Generator) -> np.ndarray:
    """A bias of keys ``[n_head_kv * head_dim]`` with the offsets of a shape; qwen2 turns channels ``i`` and
    ``i + head_dim / 2`` together, the slower the larger ``i`` is."""
    n_pairs = shape.head_dim // 2
    ranges = ((6, 7 * n_pairs // 8, n_pairs, 1 / 3, 1), (2, 7 * n_pairs // 16, 9 * n_pairs // 16, 1 / 9, 2 / 9))
    for head in bias.reshape(shape.n_head_kv, shape.head_dim):
        for n, start, stop, low, high in ranges:
            channels = rng.choice(np.r_[start:stop, start + n_pairs : stop + n_pairs], n, replace=False)
            head[channels] = rng.choice([-1, 1], n) * rng.uniform(low, high, n) * shape.offset
    return bias


def q4_0(rng: np.random.Generator, n_out: int, n_in: int) -> Bytes:
    """Random Q4_0 blocks ``[n_out, n_in / 32 * 18]``: an f16 scale, 32 values of 4 bits.

    The 4 bits run from -8 to 7: a random sign of the scale makes the mean zero.
    """
    blocks = _random_bytes(rng, n_out * n_in // 32, 18)
    _put_scale(blocks[:, :2], 1 / (_Q4_RMS * math.sqrt(n_in)))
    return blocks.reshape(n_out, -1)


def q6_k(rng: np.random.Generator, n_out: int, n_in: int) -> Bytes:
    """Random Q6_K blocks ``[n_out, n_in / 256 * 210]``: 256 values of 4 + 2 bits, 16 int8 scales, an f16 scale."""
    blocks = _random_bytes(rng, n_out * n_in // 256, 210)
    scales = blocks[:, 192:208]
    scales[:] = np.where(scales & 0x80, 256 - _Q6_SUBSCALE, _Q6_SUBSCALE)
    _put_scale(blocks[:, 208:], 1 / (_Q6_RMS * _Q6_SUBSCALE * math.sqrt(n_in)))
    return blocks.reshape(n_out, -1)


def _random_bytes(rng: np.random.Generator, n_blocks: int, size: int) -> Bytes:
    return rng.integers(0, 256, (n_blocks, size), dtype=np.uint8)


def _put_scale(field: Bytes, scale: float) -> None:
    """Make two random bytes per block an f16 of this magnitude; the sign stays random."""
    low, high = np.array([scale], "<f2").view(np.uint8)
    field[:, 0] = low
    field[:, 1] = (field[:, 1] & 0x80) | high


def _tensors(shape: Shape) -> Iterator[_Tensor]:
    f32, q4, q6 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K
    width, kv_width = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield _Tensor("token_embd.weight", (shape.n_vocab, shape.n_embd), q6 if shape.tied else q4)
    yield _Tensor("output_norm.weight", (shape.n_embd,), f32)
    if not shape.tied:
        yield _Tensor("output.weight", (shape.n_vocab, shape.n_embd), q6)
    for layer in range(shape.n_layer):
        prefix = f"blk.{layer}."
        yield _Tensor(f"{prefix}attn_norm.weight", (shape.n_embd,), f32)
        for part, n_out in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield _Tensor(f"{prefix}attn_{part}.weight", (n_out, shape.n_embd), q4)
            if shape.arch == "qwen2":
                offset = shape if part == "k" and isinstance(shape, OffsetShape) else None
                yield _Tensor(f"{prefix}attn_{part}.bias", (n_out,), f32, offset)
        yield _Tensor(f"{prefix}attn_output.weight", (shape.n_embd, width), q4)
        yield _Tensor(f"{prefix}ffn_norm.weight", (shape.n_embd,), f32)
        yield _Tensor(f"{prefix}ffn_gate.weight", (shape.n_ff, shape.n_embd), q4)
        yield _Tensor(f"{prefix}ffn_up.weight", (shape.n_ff, shape.n_embd), q4)
        yield _Tensor(f"{prefix}ffn_down.weight", (shape.n_embd, shape.n_ff), q4)


_BLOCKS = {GGMLQuantizationType.Q4_0: (32, 18), GGMLQuantizationType.Q6_K: (256, 210)}


def _write(shape: Shape, path: Path) -> None:
    writer = GGUFWriter(path, shape.arch)
    try:
        _add_metadata(writer, shape)
        _add_tokenizer(writer, shape.n_vocab)
        tensors = list(_tensors(shape))
        for tensor in tensors:
            if tensor.kind == GGMLQuantizationType.F32:
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * math.prod(tensor.shape))
                continue
            per_block, size = _BLOCKS[tensor.kind]
            stored = (tensor.shape[0], tensor.shape[1] // per_block * size)
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), math.prod(stored), tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # one tensor in memory at a time
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
    finally:
        writer.close()


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    ints = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
    }
    writer.add_string("general.name", f"random {shape.name}")
    for key, number in ints.items():
        writer.add_uint32(f"{shape.arch}.{key}", number)
    writer.add_float32(f"{shape.arch}.attention.layer_norm_rms_epsilon", shape.rms_eps)
    writer.add_float32(f"{shape.arch}.rope.freq_base", shape.rope_base)


def _add_tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    """A vocabulary of the right size that can spell every text: specials, all bytes, a space, numbered words."""
    n_pieces = n_vocab - len(_SPECIALS) - _N_BYTES
    words = itertools.chain(["\u2581"], (f"\u2581w{i}" for i in itertools.count()))
    pieces = list(itertools.islice(words, n_pieces))
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * _N_BYTES + [TokenType.NORMAL] * n_pieces
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", [*_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(_N_BYTES)), *pieces])
    writer.add_array("tokenizer.ggml.scores", [0.0] * (n_vocab - n_pieces) + [-float(i) for i in range(n_pieces)])
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in types])
    for name, token in (("unknown", 0), ("bos", 1), ("eos", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
