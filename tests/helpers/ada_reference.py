"""An independent numpy model of SnapKV, PyramidKV and Ada-KV, written from the papers for comparison."""

from __future__ import annotations

import math

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def window_attention(q: np.ndarray, k: np.ndarray, window: int) -> np.ndarray:
    """Queries ``[n_head, n, d]`` and keys ``[n_head_kv, n, d]`` to the causal attention of the last ``window`` queries
    over all ``n`` keys, ``[n_head, window, n]``."""
    n_head, n, d = q.shape
    logits = np.einsum("hid,hjd->hij", q[:, -window:], np.repeat(k, n_head // len(k), 0)) / math.sqrt(d)
    rows, columns = np.arange(n - window, n)[:, None], np.arange(n)[None]
    return softmax(np.where(columns <= rows, logits, -np.inf))


def pool1d(x: np.ndarray, kernel: int, kind: str) -> np.ndarray:
    """``avgpool`` counts what lies beyond the ends as zeros, ``maxpool`` leaves it out."""
    half, n = kernel // 2, x.shape[-1]
    out = np.empty_like(x)
    for t in range(n):
        part = x[..., max(0, t - half) : min(n, t + half + 1)]
        out[..., t] = part.sum(-1) / kernel if kind == "avgpool" else part.max(-1)
    return out


def reduce_groups(x: np.ndarray, n_head_kv: int, agg: str) -> np.ndarray:
    x = x.reshape(n_head_kv, x.shape[0] // n_head_kv, *x.shape[1:])
    return x.mean(1) if agg == "mean" else x.max(1)


def snap_scores(q: np.ndarray, k: np.ndarray, window: int, kernel: int, pooling: str, agg: str = "mean") -> np.ndarray:
    attention = window_attention(q, k, window)[..., :-window].mean(1)
    return pool1d(reduce_groups(attention, len(k), agg), kernel, pooling)


def topk_idx(scores: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:n]


def ada_counts(scores: np.ndarray, budget: int) -> np.ndarray:
    """How many of the ``n_head * budget`` largest scores lie in each head; of equal ones, the first in the array."""
    n_head, n = scores.shape
    order = np.argsort(-scores.reshape(-1), kind="stable")[: n_head * budget]
    return np.bincount(order // n, minlength=n_head)


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    counts = np.floor(shares + 1e-9).astype(int)
    left = int(total - counts.sum())
    for i in np.argsort(-(shares - counts), kind="stable")[:left]:
        counts[i] += 1
    return counts


def ada_budget_exact(scores: np.ndarray, budget: int, alpha: float) -> np.ndarray:
    adaptive = ada_counts(scores, budget)
    return largest_remainder((1 - alpha) * adaptive + alpha * budget, len(scores) * budget)


def ada_budget_official(scores: np.ndarray, budget: int, alpha: float) -> np.ndarray:
    """With the rounding of the AdaKV repository: single precision, every head by itself."""
    floor = np.float32(int(budget * alpha))
    shares = [np.float32(np.float32(count) * np.float32(1 - alpha) + floor) for count in ada_counts(scores, budget)]
    return np.array([round(float(share)) for share in shares])


def ada_protect(scores: np.ndarray, total: int, n_safe: int) -> list[np.ndarray]:
    """The best ``n_safe`` of every head and the best of the rest, as kvpress does it; indices per head."""
    n_head, n = scores.shape
    raised = scores.astype(float).copy()
    for h in range(n_head):
        raised[h, topk_idx(scores[h], n_safe)] = np.inf
    order = np.argsort(-raised.reshape(-1), kind="stable")[:total]
    return [np.sort(order[order // n == h] % n) for h in range(n_head)]


def pyramid(budget: int, window: int, beta: int, n_layer: int, n: int) -> list[int]:
    """Prefix slots per layer with the integer steps of the AdaKV repository."""
    mean = budget - window
    low = mean // beta
    high = 2 * mean - low
    if high >= n - window:
        high = n - window
        low = 2 * mean - high
    step = (high - low) // (n_layer - 1)
    return [high - layer * step for layer in range(n_layer)]


def pyramid_kvpress(ratio: float, window: int, beta: int, n_layer: int, n: int) -> list[int]:
    """Slots per layer of kvpress, which evicts the share ``ratio``."""
    mean = n * (1 - ratio)
    low = mean / beta
    high = 2 * mean - low
    if high >= n - window:
        high = n - window
        low = 2 * mean - high
    if not n >= high >= low >= window:
        return [round(mean)] * n_layer
    step = (high - low) / (n_layer - 1)
    return [round(high - layer * step) for layer in range(n_layer)]
