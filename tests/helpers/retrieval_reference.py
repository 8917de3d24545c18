"""What a token reads, chosen in plain numpy: what kvl_retrieve is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_key(keys: np.ndarray) -> np.ndarray:
    """What stands for a unit of keys ``[n, d]``; of none: zero."""
    return keys.mean(0) if len(keys) else np.zeros(keys.shape[1])


def bounds(keys: np.ndarray) -> np.ndarray:
    """Largest and smallest value per channel, ``[2, d]``."""
    return np.stack([keys.max(0), keys.min(0)])


def bound(query: np.ndarray, of: np.ndarray) -> float:
    """The largest dot product with a query that a key within the bounds can have."""
    return float(np.maximum(query * of[0], query * of[1]).sum())


def one_scale(scores: np.ndarray) -> np.ndarray:
    """Scores ``[n_head, n_unit]`` less their mean over the units, in deviations, added up over the heads."""
    deviation = scores.std(1, keepdims=True)
    return np.divide(scores - scores.mean(1, keepdims=True), deviation, where=deviation > 0, out=0 * scores).sum(0)


def choose(
    scores: Sequence[float], sizes: Sequence[float], room: float, least: int, *, partial: bool = False
) -> tuple[list[int], tuple[int, int] | None]:
    """Units in the order in which they are taken, and with ``partial`` the unit of which only so many tokens are.

    The best first, of equal ones the earliest; what does not fit is passed over, until less than ``least`` is left.
    """
    out: list[int] = []
    for unit in sorted(range(len(scores)), key=lambda u: (-scores[u], u)):
        if room < least:
            break
        if sizes[unit] <= 0:
            continue
        if sizes[unit] > room:
            if partial:
                return out, (unit, int(room))
            continue
        out.append(unit)
        room -= sizes[unit]
    return out, None


def eligible(ends: Sequence[int], n_seen: int, sink: int, recent: int) -> list[np.ndarray]:
    """Of every closed unit the positions that are read only if it is chosen: neither sinks nor among the last."""
    first = min(sink, n_seen)
    last = max(first, n_seen + 1 - recent)
    begins = [0, *ends[:-1]]
    return [np.arange(max(begin, first), min(end, last)) for begin, end in zip(begins, ends, strict=True)]


def delta(resident: set[int], wanted: set[int], sizes: dict[int, int]) -> tuple[int, set[int], float]:
    """Of a recall: tokens to load, units to give back, and the share of the wanted tokens that is there already."""
    load = sum(sizes[unit] for unit in wanted - resident)
    there = sum(sizes[unit] for unit in wanted & resident)
    return load, resident - wanted, there / (there + load)
