"""One price per byte: which rung of a ladder of formats every page of every head can afford.

A *step* lifts one page from a rung to the next better one that is worth it. Steps are sold in the order of what they
gain per byte until the budget is spent; that order is the same as one price for all, without a search for the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

GONE = -1
"""The rung of what is not kept."""


@dataclass(frozen=True)
class Pages:
    """What competes, one entry per page; best page of a head first, as ``rank`` counts.

    Attributes:
        weight: float64 ``[n]``: importance of the page's tokens, added up.
        ceiling: int64 ``[n]``: best rung that it may stand on.
        head: int64 ``[n]``: whose it is, counted over all layers.
        rank: int64 ``[n]``: its place among the pages of its head.
    """

    weight: Floats
    ceiling: Ints
    head: Ints
    rank: Ints


def hull(cost: Sequence[float], error: Sequence[float], ceiling: int) -> list[tuple[int, float, float]]:
    """The steps from :data:`GONE` (nothing, error 1) upwards that pay: ``(rung, more bytes, less error)`` each.

    Only rungs on the lower convex hull of (bytes, error) are ever the best for some price.

    Args:
        cost: bytes per rung, the best rung first.
        error: relative error per rung, likewise.
        ceiling: rungs above this one are not offered.
    """
    points = sorted((cost[r], error[r], r) for r in range(ceiling, len(cost)))
    corners: list[tuple[float, float, int]] = [(0.0, 1.0, GONE)]
    for point in points:
        if point[1] >= corners[-1][1]:
            continue
        while len(corners) > 1 and _gain(corners[-2], corners[-1]) <= _gain(corners[-2], point):
            corners.pop()
        corners.append(point)
    return [(b[2], b[0] - a[0], a[1] - b[1]) for a, b in pairwise(corners)]


def _gain(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def climb(
    pages: Pages, costs: Sequence[Sequence[float]], error: Sequence[float], budget: float, reserved: Floats
) -> Ints:
    """The rung of every page, int64 ``[n]``, for at most ``budget`` bytes (spec: ladder, section Method).

    Minimises ``sum(weight * error[rung])`` up to the last step that fits: steps of all pages in the order of gain per
    byte (equal gains: the higher rank, then the lower head); those that no longer fit are passed over.

    Args:
        pages: what competes.
        costs: bytes of a page per rung, for every head.
        error: relative error of what a rung stores, best rung first.
        budget: bytes for all pages.
        reserved: bytes per head that its own best steps get before the heads compete.
    """
    out = np.full(len(pages.weight), GONE, np.int64)
    page, rung, more, less, order = _steps(pages, costs, error)
    if not len(page):
        return out
    gain = pages.weight[page] * less / more
    heads, ranks = pages.head[page], pages.rank[page]
    best = np.lexsort((heads, ranks, order, -gain))
    first = _reserve(best, heads, more, reserved)
    best = np.concatenate([best[first[best]], best[~first[best]]])
    paid = np.cumsum(more[best]) <= budget
    n = len(paid) if paid.all() else int(paid.argmin())
    taken = np.zeros(len(page), bool)
    taken[best[:n]] = True
    left = budget - more[best[:n]].sum()
    # a step needs the one before it, which comes earlier in `best`: a page's own gains fall from step to step
    rest, least = best[n:], more.min()
    for step in rest[more[rest] <= left]:
        if left < least:
            break
        if more[step] <= left and (order[step] == 0 or taken[step - 1]):
            taken[step] = True
            left -= more[step]
    reach = np.bincount(page[taken], minlength=len(out))
    up = np.flatnonzero(reach)
    out[up] = rung[np.searchsorted(page, up) + reach[up] - 1]
    return out


def _steps(
    pages: Pages, costs: Sequence[Sequence[float]], error: Sequence[float]
) -> tuple[Ints, Ints, Floats, Floats, Ints]:
    """All steps, those of a page next to each other: page, rung reached, more bytes, less error, number in the page."""
    kinds: dict[tuple[int, tuple[float, ...]], list[tuple[int, float, float]]] = {}
    shapes = [tuple(cost) for cost in costs]
    ladders = []
    for ceiling, head in zip(pages.ceiling.tolist(), pages.head.tolist(), strict=True):
        key = (ceiling, shapes[head])
        if key not in kinds:
            kinds[key] = hull(shapes[head], error, ceiling)
        ladders.append(kinds[key])
    counts = np.array([len(ladder) for ladder in ladders], np.int64)
    page = np.repeat(np.arange(len(ladders)), counts)
    order = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = np.array([step for ladder in ladders for step in ladder], np.float64).reshape(-1, 3)
    return page, flat[:, 0].astype(np.int64), flat[:, 1], flat[:, 2], order


def _reserve(best: Ints, heads: Ints, more: Floats, reserved: Floats) -> npt.NDArray[np.bool_]:
    """Which steps fall within what their head is sure of: its first ones, in the order ``best``."""
    by_head = best[np.argsort(heads[best], kind="stable")]
    spent = np.cumsum(more[by_head])
    starts = np.searchsorted(heads[by_head], heads[by_head])
    before = np.where(starts > 0, spent[starts - 1], 0.0)
    out = np.zeros(len(best), bool)
    out[by_head] = spent - before <= reserved[heads[by_head]]
    return out
