"""Which positions are due to be demoted."""

from __future__ import annotations

import numpy as np


def all_but_ends(n_seen: int, n_first: int, n_last: int) -> np.ndarray:
    """Positions between the first and the last so many of ``n_seen`` tokens, int32, ascending."""
    return np.arange(n_first, n_seen - n_last, dtype=np.int32)


def all_but_log(n_seen: int, sink: int, tail: int, n_window: int) -> np.ndarray:
    """Positions that LogQuant with ``tail`` tokens in full precision demotes, int32, ascending; never the first
    ``sink`` and the last ``n_window``."""
    out = np.ones(max(n_seen - n_window, 0), bool)
    kept = log_positions(n_seen, tail // 3)
    out[kept[kept < len(out)]] = False
    out[:sink] = False
    return np.flatnonzero(out).astype(np.int32)


def log_positions(n_seen: int, window: int) -> np.ndarray:
    """Positions that LogQuant keeps in full precision after ``n_seen`` tokens, int64, ascending.

    Algorithm 1 of arXiv:2503.19950: when ``3 * window`` tokens are held and another comes, every second of the oldest
    ``2 * window`` goes. The set depends on the number of tokens alone, so chunks and batches make no difference.
    Between ``2 * window + 1`` and ``3 * window`` tokens once so many were seen, the very first always among them.
    """
    held = np.arange(min(n_seen, 3 * window))
    for end in range(3 * window, n_seen, window):
        new = np.arange(end, min(end + window, n_seen))
        held = np.concatenate([held[: 2 * window : 2], held[2 * window :], new])
    return held
