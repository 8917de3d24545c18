"""One decode step of a llama model in numpy, over any set of cached keys and values: the dense reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFReader

ReadKV = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class DenseLlama:
    """Weights of a tiny ``llama`` GGUF (f32); float64 throughout, K and V of the new token rounded to f16."""

    def __init__(self, path: Path, *, n_layer: int, n_head: int, n_head_kv: int, head_dim: int) -> None:
        self.weights = {t.name: t.data.astype(np.float64).reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}
        self.n_layer, self.n_head, self.n_head_kv, self.head_dim = n_layer, n_head, n_head_kv, head_dim

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * self.weights[name]

    def _rope(self, x: np.ndarray, pos: int) -> np.ndarray:
        """Interleaved rotation, base 10000, ``[heads, head_dim]``."""
        angle = pos * 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        even, odd = x[:, 0::2], x[:, 1::2]
        out = np.empty_like(x)
        out[:, 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[:, 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    def step(self, token: int, pos: int, read_kv: ReadKV) -> np.ndarray:
        """Logits of ``token`` at ``pos`` attending to ``read_kv(layer, head)`` (K and V ``[n, d]``) and to itself."""
        w, group = self.weights, self.n_head // self.n_head_kv
        x = w["token_embd.weight"][token]
        for layer in range(self.n_layer):
            prefix = f"blk.{layer}."
            h = self._norm(x, prefix + "attn_norm.weight")
            q, k, v = ((w[f"{prefix}attn_{p}.weight"] @ h).reshape(-1, self.head_dim) for p in "qkv")
            q, k = self._rope(q, pos), self._rope(k, pos)
            out = np.empty_like(q)
            for head in range(self.n_head):
                keys, values = read_kv(layer, head // group)
                keys = np.vstack([keys, k[head // group].astype(np.float16)])
                values = np.vstack([values, v[head // group].astype(np.float16)])
                z = keys @ q[head] / np.sqrt(self.head_dim)
                a = np.exp(z - z.max())
                out[head] = a @ values / a.sum()
            x = x + w[prefix + "attn_output.weight"] @ out.reshape(-1)
            h = self._norm(x, prefix + "ffn_norm.weight")
            gate = w[prefix + "ffn_gate.weight"] @ h
            x = x + w[prefix + "ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w[prefix + "ffn_up.weight"] @ h))
        return w["output.weight"] @ self._norm(x, "output_norm.weight")
