"""Rounding rules of other implementations: the totals of ``compat=adakv`` and ``compat=kvpress`` drift a little."""

from __future__ import annotations

import numpy as np

from kvlocal.policies.parts.scoring import Ints


def pyramid_adakv(budget: int, beta: int, n_layer: int, n_prefix: int) -> Ints:
    """The progression of the AdaKV repository: the step is an integer, so the total drifts upwards."""
    if n_layer == 1 or budget >= n_prefix:
        return np.full(n_layer, min(budget, n_prefix), dtype=np.int64)
    low = budget // beta
    high = 2 * budget - low
    if high >= n_prefix:
        high, low = n_prefix, 2 * budget - n_prefix
    return high - np.arange(n_layer, dtype=np.int64) * ((high - low) // (n_layer - 1))


def pyramid_kvpress(budget: int, beta: int, n_layer: int, n_tokens: int, n_always: int) -> Ints:
    """The layer budgets of kvpress: the window (``n_always`` slots) is inside, each layer is rounded on its own.

    Falls back to ``budget`` everywhere unless ``n_tokens >= high >= low >= n_always``.
    """
    low = budget / beta
    high = 2 * budget - low
    if high >= n_tokens - n_always:
        high, low = float(n_tokens - n_always), 2.0 * budget - (n_tokens - n_always)
    if n_layer == 1 or not n_tokens >= high >= low >= n_always:
        return np.full(n_layer, budget, dtype=np.int64)
    step = (high - low) / (n_layer - 1)
    return np.rint(high - np.arange(n_layer) * step).astype(np.int64)


def mix_adakv(adaptive: Ints, budget: int, alpha: float) -> Ints:
    """The rounding of the AdaKV repository: integer floor, then float32 rounded half to even; the total drifts."""
    share = np.float32(1 - alpha) * adaptive.astype(np.float32) + np.float32(int(budget * alpha))
    return np.rint(share).astype(np.int64)
