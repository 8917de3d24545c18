"""The weights of tiny random models: tensors per architecture, scaled as the numbers of a trained model are.

Attention logits have a standard deviation of about `attn_std`, so that attention is neither uniform nor one-hot, and
output logits one of about `LOGIT_STD`. A tensor's values depend only on the seed, its name and its shape.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Tensors = Iterator[tuple[str, Array]]

LOGIT_STD = 3.0
SSM_CONV, SSM_STATE = 4, 16


@dataclass(frozen=True)
class TinySpec:
    """What was written: every hyper-parameter a numpy oracle needs to read the file."""

    path: Path
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    n_embd: int
    n_vocab: int
    n_ff: int
    n_ctx: int
    seed: int
    qkv_bias: float
    attn_std: float

    @property
    def qk_gain(self) -> float:
        """Standard deviation of one component of q and of k: their dot product over sqrt(d) then has `attn_std`."""
        return math.sqrt(self.attn_std)

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> Array:
        """Return the tensor's random values, normally distributed around 0."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def linear(self, name: str, n_in: int, n_out: int, gain: float = 1.0) -> tuple[str, Array]:
        """Return a weight that turns inputs of unit variance into outputs of variance gain**2."""
        return name, self.normal(name, (n_out, n_in), gain / math.sqrt(n_in))

    def norm(self, name: str, size: int, mean: float = 1.0) -> tuple[str, Array]:
        """Return the weight of a norm: `mean`, give or take 10 %."""
        return name, mean * (1 + self.normal(name, (size,), 0.1))


def tensors(spec: TinySpec) -> Tensors:
    tied = spec.arch in ("gemma", "gemma2", "plm")
    # Gemma multiplies embeddings by sqrt(n_embd); the others read them as they are.
    embd_std = 1 / math.sqrt(spec.n_embd) if spec.arch in ("gemma", "gemma2") else 1.0
    yield "token_embd.weight", spec.normal("token_embd.weight", (spec.n_vocab, spec.n_embd), embd_std)
    if spec.arch == "bert":
        yield "position_embd.weight", spec.normal("position_embd.weight", (spec.n_ctx, spec.n_embd), 0.5)
        yield "token_types.weight", spec.normal("token_types.weight", (2, spec.n_embd), 0.5)
        yield from _layer_norm(spec, "token_embd_norm")
    else:
        if tied:
            # A random sign per channel: else each token would predict itself, because the residual stream carries its
            # embedding all the way to the output matrix, which is the same matrix.
            yield "output_norm.weight", spec.normal("output_norm.weight", (spec.n_embd,), LOGIT_STD)
        else:
            yield spec.norm("output_norm.weight", spec.n_embd)
            yield spec.linear("output.weight", spec.n_embd, spec.n_vocab, LOGIT_STD)
    for layer in range(spec.n_layer):
        yield from LAYERS[spec.arch](spec, f"blk.{layer}.")


def _qkv(spec: TinySpec, prefix: str, *, fused: bool = False, gain: float | None = None) -> Tensors:
    gain = spec.qk_gain if gain is None else gain
    width, kv_width = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    parts = (("q", width, gain), ("k", kv_width, gain), ("v", kv_width, 1.0))
    weights = [spec.linear(f"{prefix}attn_{p}.weight", spec.n_embd, n, g) for p, n, g in parts]
    biases = [
        (name, spec.normal(name, (n,), spec.qkv_bias)) for p, n, _ in parts for name in [f"{prefix}attn_{p}.bias"]
    ]
    for kind, tensors in (("weight", weights), ("bias", biases if spec.qkv_bias else [])):
        if fused and tensors:
            yield f"{prefix}attn_qkv.{kind}", np.concatenate([values for _, values in tensors])
        else:
            yield from tensors


def _attention_output(spec: TinySpec, prefix: str) -> tuple[str, Array]:
    # The average over many values is small: the gain keeps attention visible in the output logits.
    return spec.linear(f"{prefix}attn_output.weight", spec.n_head * spec.head_dim_v, spec.n_embd, 2.0)


def _ffn(spec: TinySpec, prefix: str, *, gated: bool = True) -> Tensors:
    if gated:
        yield spec.linear(f"{prefix}ffn_gate.weight", spec.n_embd, spec.n_ff)
    yield spec.linear(f"{prefix}ffn_up.weight", spec.n_embd, spec.n_ff)
    yield spec.linear(f"{prefix}ffn_down.weight", spec.n_ff, spec.n_embd)


def _layer_norm(spec: TinySpec, name: str) -> Tensors:
    yield spec.norm(f"{name}.weight", spec.n_embd)
    yield f"{name}.bias", spec.normal(f"{name}.bias", (spec.n_embd,), 0.1)


def _plain(spec: TinySpec, prefix: str) -> Tensors:
    """llama, qwen2, gemma: pre-norm attention and a gated FFN."""
    yield spec.norm(f"{prefix}attn_norm.weight", spec.n_embd)
    yield from _qkv(spec, prefix)
    yield _attention_output(spec, prefix)
    yield spec.norm(f"{prefix}ffn_norm.weight", spec.n_embd)
    yield from _ffn(spec, prefix)


def _qwen3(spec: TinySpec, prefix: str) -> Tensors:
    yield from _plain(spec, prefix)
    # The norm on q and k undoes the gain of their weights, so it carries the gain itself.
    yield spec.norm(f"{prefix}attn_q_norm.weight", spec.head_dim, spec.qk_gain)
    yield spec.norm(f"{prefix}attn_k_norm.weight", spec.head_dim, spec.qk_gain)


def _phi3(spec: TinySpec, prefix: str) -> Tensors:
    yield spec.norm(f"{prefix}attn_norm.weight", spec.n_embd)
    yield from _qkv(spec, prefix, fused=True)
    yield _attention_output(spec, prefix)
    yield spec.norm(f"{prefix}ffn_norm.weight", spec.n_embd)
    yield spec.linear(f"{prefix}ffn_up.weight", spec.n_embd, 2 * spec.n_ff)  # gate and up, stacked
    yield spec.linear(f"{prefix}ffn_down.weight", spec.n_ff, spec.n_embd)


def _gemma2(spec: TinySpec, prefix: str) -> Tensors:
    yield from _plain(spec, prefix)
    yield spec.norm(f"{prefix}post_attention_norm.weight", spec.n_embd)
    yield spec.norm(f"{prefix}post_ffw_norm.weight", spec.n_embd)


def dt_rank(spec: TinySpec) -> int:
    return max(1, spec.n_embd // 16)


def _mamba(spec: TinySpec, prefix: str) -> Tensors:
    inner, rank = 2 * spec.n_embd, dt_rank(spec)
    yield spec.norm(f"{prefix}attn_norm.weight", spec.n_embd)
    yield spec.linear(f"{prefix}ssm_in.weight", spec.n_embd, 2 * inner)
    yield spec.linear(f"{prefix}ssm_conv1d.weight", SSM_CONV, inner)
    yield f"{prefix}ssm_conv1d.bias", spec.normal(f"{prefix}ssm_conv1d.bias", (inner,), 0.1)
    yield spec.linear(f"{prefix}ssm_x.weight", inner, rank + 2 * SSM_STATE)
    yield spec.linear(f"{prefix}ssm_dt.weight", rank, inner)
    # softplus(-3) is a time step of about 0.05: the state remembers some tens of tokens and cannot blow up.
    yield f"{prefix}ssm_dt.bias", -3 + spec.normal(f"{prefix}ssm_dt.bias", (inner,), 0.5)
    yield f"{prefix}ssm_a", np.tile(-np.arange(1, SSM_STATE + 1, dtype=np.float32), (inner, 1))
    yield spec.norm(f"{prefix}ssm_d", inner)
    yield spec.linear(f"{prefix}ssm_out.weight", inner, spec.n_embd)


def kv_rank(spec: TinySpec) -> int:
    return spec.head_dim


def _plm(spec: TinySpec, prefix: str) -> Tensors:
    """Keys and values come from a latent, and are cached whole; all heads share the turned half of a key, its last."""
    rank, rope = kv_rank(spec), spec.head_dim // 2
    nope = spec.head_dim - rope
    yield spec.norm(f"{prefix}attn_norm.weight", spec.n_embd)
    yield spec.linear(f"{prefix}attn_q.weight", spec.n_embd, spec.n_head * spec.head_dim, spec.qk_gain)
    yield spec.linear(f"{prefix}attn_kv_a_mqa.weight", spec.n_embd, rank + rope, spec.qk_gain)
    yield spec.norm(f"{prefix}attn_kv_a_norm.weight", rank)
    yield spec.linear(f"{prefix}attn_kv_b.weight", rank, spec.n_head * (nope + spec.head_dim_v))
    yield _attention_output(spec, prefix)
    yield spec.norm(f"{prefix}ffn_norm.weight", spec.n_embd)
    yield from _ffn(spec, prefix, gated=False)


def _bert(spec: TinySpec, prefix: str) -> Tensors:
    yield from _qkv(spec, prefix)
    yield _attention_output(spec, prefix)
    yield from _layer_norm(spec, f"{prefix}attn_output_norm")
    yield from _ffn(spec, prefix, gated=False)
    yield from _layer_norm(spec, f"{prefix}layer_output_norm")


LAYERS: dict[str, Callable[[TinySpec, str], Tensors]] = {
    "llama": _plain,
    "qwen2": _plain,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma": _plain,
    "gemma2": _gemma2,
    "mamba": _mamba,
    "plm": _plm,
    "bert": _bert,
}
