"""Tiny random-weight GGUF models, so that native code is tested on every architecture without a download.

    spec = write_model(tmp_path / "m.gguf", "llama", n_head=8, n_head_kv=2, head_dim=128)

Their weights are in tinyweights: the "f32" and the "f16" file of one seed hold the same model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from gguf import GGUFWriter, TokenType
from tinyweights import LAYERS, SSM_CONV, SSM_STATE, TinySpec, dt_rank, kv_rank, tensors

SPECIALS = ("<unk>", "<s>", "</s>")
"""Ids 0, 1, 2; the byte `b` is id `3 + b`, and pieces follow from id 259."""

N_BYTES = 256
RMS_EPS = 1e-5
SQUARE_ARCHS = frozenset({"qwen2", "phi3", "bert"})
"""Their loaders want n_embd == n_head * head_dim; elsewhere n_embd is free."""

SPACE = "\u2581"
COMMON = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ing", "and", SPACE + "t", SPACE + "the")


class Combo(NamedTuple):
    """One point of the test grid; the GQA ratio is `n_head // n_head_kv`."""

    arch: str
    n_head: int
    n_head_kv: int
    head_dim: int

    @property
    def id(self) -> str:
        """A short name for `pytest.mark.parametrize(ids=...)`."""
        return f"{self.arch}-h{self.n_head}kv{self.n_head_kv}d{self.head_dim}"


def write_model(
    path: str | Path,
    arch: str,
    *,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    n_embd: int | None = None,
    n_vocab: int = 320,
    n_ff: int = 256,
    n_ctx: int = 8192,
    seed: int = 0,
    dtype: Literal["f32", "f16"] = "f32",
    qkv_bias: float | None = None,
    attn_std: float = 1.5,
    chat_template: str | None = None,
    tokenizer: str = "llama",
    add_eos: bool = False,
    markers: Sequence[str] = (),
) -> TinySpec:
    """Write a model of `arch` with random weights to `path` and return its hyper-parameters.

    `head_dim_v`: values per head of V (plm), None for head_dim. Head counts need not divide: llama.cpp loads
    such files. `tokenizer`: "llama", or a name for a file without a vocabulary. `n_embd`: width of the residual stream;
    None means 128, or n_head * head_dim where the architecture demands it. `n_ctx`: training context in tokens.
    `qkv_bias`: standard deviation of the QKV biases, 0 for none; None means 0.5 for qwen2 and none elsewhere.
    `attn_std`: standard deviation of the attention logits. "f16" keeps vectors in f32. `add_eos`: the tokenizer wants
    EOS at the end of texts. `markers`: user-defined tokens, the last ones.
    mamba and bert read only those parameters that mean something for them.
    Raises ValueError for an unknown architecture and for sizes that it cannot have.
    """
    if arch not in LAYERS:
        raise ValueError(f"unknown architecture {arch!r}: one of {', '.join(sorted(LAYERS))}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even")
    d_v = head_dim if head_dim_v is None else head_dim_v
    if d_v != head_dim and arch != "plm":
        raise ValueError(f"{arch} is written with head_dim_v = head_dim only")
    if n_vocab <= len(SPECIALS) + N_BYTES:
        raise ValueError(f"n_vocab {n_vocab} must exceed {len(SPECIALS) + N_BYTES}: specials, bytes, the space")
    if n_embd is None:
        n_embd = n_head * head_dim if arch in SQUARE_ARCHS else 128
    elif arch in SQUARE_ARCHS and n_embd != n_head * head_dim:
        raise ValueError(f"{arch} wants n_embd {n_head * head_dim} = n_head * head_dim, not {n_embd}")
    bias = (0.5 if arch == "qwen2" else 0.0) if qkv_bias is None else qkv_bias
    n_ctx = min(n_ctx, 512) if arch == "bert" else n_ctx  # it stores one embedding per position
    spec = TinySpec(
        *(Path(path), arch, n_layer, n_head, n_head_kv, head_dim, d_v),
        *(n_embd, n_vocab, n_ff, n_ctx, seed, bias, attn_std),
    )

    writer = GGUFWriter(spec.path, arch)
    _write_metadata(writer, spec)
    if tokenizer == "llama":
        _write_tokenizer(writer, n_vocab, chat_template, add_eos, markers)
    else:
        writer.add_string("tokenizer.ggml.model", tokenizer)
        writer.add_uint32(f"{arch}.vocab_size", n_vocab)
    for name, values in tensors(spec):
        # Vectors and the operands of the state-space scan exist in f32 only.
        small = values.ndim == 1 or ".ssm_conv1d" in name or name.endswith(".ssm_a")
        writer.add_tensor(name, values if small or dtype == "f32" else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spec


def default_grid() -> list[Combo]:
    """Combinations that cover the architectures above, GQA 1, 3, 4, 8 and head sizes 64, 80, 128, 256."""
    return [
        Combo("llama", 4, 4, 64),
        Combo("llama", 6, 2, 80),
        Combo("llama", 8, 2, 128),
        Combo("qwen2", 6, 2, 64),
        Combo("qwen2", 8, 1, 64),
        Combo("qwen3", 8, 2, 128),
        Combo("qwen3", 3, 1, 256),
        Combo("phi3", 4, 1, 80),
        Combo("phi3", 3, 3, 128),
        Combo("gemma", 8, 1, 256),
        Combo("gemma2", 4, 2, 64),
    ]


def refused_archs() -> list[str]:
    """Architectures a paged cache cannot hold: recurrent, encoder."""
    return ["mamba", "bert"]


def _write_metadata(writer: GGUFWriter, spec: TinySpec) -> None:
    ints = {
        "context_length": spec.n_ctx,
        "embedding_length": spec.n_embd,
        "block_count": spec.n_layer,
        "feed_forward_length": spec.n_ff,
        "attention.head_count": spec.n_head,
        "attention.head_count_kv": spec.n_head_kv,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim_v,
        "rope.dimension_count": spec.head_dim,
    }
    floats = {"attention.layer_norm_rms_epsilon": RMS_EPS, "rope.freq_base": 10000.0}
    if spec.arch == "gemma2":
        ints["attention.sliding_window"] = 64
        floats |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    elif spec.arch == "mamba":
        ints |= {"feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": 0}
        ints |= {"ssm.conv_kernel": SSM_CONV, "ssm.inner_size": 2 * spec.n_embd, "ssm.state_size": SSM_STATE}
        ints |= {"ssm.time_step_rank": dt_rank(spec)}
    elif spec.arch == "plm":
        ints |= {"attention.kv_lora_rank": kv_rank(spec), "rope.dimension_count": spec.head_dim // 2}
    elif spec.arch == "bert":
        ints["pooling_type"] = 1
        floats["attention.layer_norm_epsilon"] = RMS_EPS
        writer.add_bool(f"{spec.arch}.attention.causal", False)
        writer.add_uint32("tokenizer.ggml.token_type_count", 2)

    # Without the architecture: llama.cpp looks for special tokens that a model of such a name ought to have.
    writer.add_string("general.name", "tiny random model")
    for key, number in ints.items():
        writer.add_uint32(f"{spec.arch}.{key}", number)
    for key, value in floats.items():
        writer.add_float32(f"{spec.arch}.{key}", value)


def _write_tokenizer(writer: GGUFWriter, n_vocab: int, chat: str | None, add_eos: bool, markers: Sequence[str]) -> None:
    """Add a SentencePiece-like vocabulary: specials, all bytes, letters, and merges of which earlier ones win."""
    pieces = [*_pieces(n_vocab - len(SPECIALS) - N_BYTES - len(markers)), *markers]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), *pieces]
    types = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 2 + [TokenType.BYTE] * N_BYTES
    types += [TokenType.NORMAL] * (len(pieces) - len(markers)) + [TokenType.USER_DEFINED] * len(markers)
    scores = [0.0] * (len(SPECIALS) + N_BYTES) + [-float(rank) for rank in range(len(pieces))]

    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", scores)
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in types])
    for name, token_id in (("unknown", 0), ("bos", 1), ("eos", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_eos_token", add_eos)
    writer.add_bool("tokenizer.ggml.add_space_prefix", True)
    if chat is not None:
        writer.add_string("tokenizer.chat_template", chat)


def _pieces(count: int) -> list[str]:
    letters = "etaoinshrdlcumwfgypbvkxjqz"
    words = list(dict.fromkeys([SPACE, *letters, *COMMON, *(SPACE + letter for letter in letters)]))
    filler = ("".join(chars) for size in (2, 3, 4) for chars in itertools.product(letters, repeat=size))
    new = (piece for piece in filler if piece not in words)
    return list(itertools.islice(itertools.chain(words, new), count))
