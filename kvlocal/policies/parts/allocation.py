"""Dividing a budget: over the KV heads of a layer, and over layers. Integers in, integers out, totals exact.

``H`` KV heads, ``L`` layers; *prefix* means the slots that compete (neither sink nor window).
"""

from __future__ import annotations

import numpy as np

from kvlocal.errors import UsageError
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Floats, Ints, top
from kvlocal.policies.parts.view import CacheView, LayerView


def require_budget(policy: Policy, view: CacheView) -> None:
    """Raises :class:`UsageError` when the budget leaves no room for what the policy always keeps."""
    if view.budget < policy.min_budget:
        raise UsageError(
            f"policy {policy.name} needs a budget of at least {policy.min_budget} tokens per head "
            f"(what it always keeps, and one more), but was given {view.budget}."
        )


def slots_held(view: CacheView) -> Ints:
    """Slots held per layer, all heads together, int64 ``[L]``."""
    return np.array([layer.n_slots.sum() for layer in view.layers], dtype=np.int64)


def uniform_totals(view: CacheView) -> Ints:
    """The same total for every layer, at most what the layer holds, int64 ``[L]``."""
    heads = np.array([layer.n_head_kv for layer in view.layers], dtype=np.int64)
    return np.minimum(heads * view.budget, slots_held(view))


def uniform_counts(policy: Policy, view: CacheView) -> Ints:
    """The same number of slots for every head of every layer, where it holds that many, int64 ``[L, H]``.

    Raises:
        UsageError: the budget leaves no room for what the policy always keeps.
    """
    require_budget(policy, view)
    counts = [spread(int(t), layer.n_slots) for t, layer in zip(uniform_totals(view), view.layers, strict=True)]
    return np.array(counts, dtype=np.int64)


def check_counts(layer: LayerView, counts: Ints, low: Ints | int = 1) -> None:
    """Raises ``ValueError`` unless every head can keep its count: at least ``low``, at most what it holds."""
    held = layer.n_slots
    if np.shape(counts) != held.shape or (counts > held).any() or (counts < np.minimum(low, held)).any():
        raise ValueError(f"cannot keep {counts} of {held} slots, and at least {low}")


def spread(total: int, caps: Ints, start: Ints | None = None) -> Ints:
    """Raises ``start`` (default: zeros) by a common amount until the sum is ``total``; nobody exceeds their cap.

    What a capped entry cannot take goes to the others in equal parts; units that do not divide go to lower indices.

    Args:
        total: between ``sum(min(start, caps))`` and ``sum(caps)``.
        caps: int64 ``[n]``.
        start: int64 ``[n]``.
    """
    counts: Ints = np.zeros_like(caps) if start is None else np.minimum(start, caps)
    if not counts.sum() <= total <= caps.sum():
        raise ValueError(f"cannot spread {total}: the entries take between {counts.sum()} and {caps.sum()}")
    while (left := int(total - counts.sum())) > 0:
        open_ = np.flatnonzero(counts < caps)
        each = left // len(open_)
        if each == 0:
            counts[open_[:left]] += 1
        else:
            counts[open_] = np.minimum(counts[open_] + each, caps[open_])
    return counts


def largest_remainder(shares: Floats, total: int) -> Ints:
    """Rounds real shares that add up to ``total`` to integers that do: floor, then +1 where the fraction is largest.

    Equal fractions: the lower index first. No result is further than 1 from its share.
    """
    counts: Ints = np.floor(shares).astype(np.int64)
    fractions = np.round(shares - counts, 9)
    counts[np.argsort(-fractions, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def pyramid(budget: int, beta: int, n_layer: int, n_prefix: int) -> Ints:
    """PyramidKV's prefix budget per layer, with the exact total ``n_layer * min(budget, n_prefix)``.

    ``low = budget / beta``, ``high = 2 * budget - low``; where ``high`` exceeds the prefix, ``high = n_prefix`` and
    ``low = 2 * budget - n_prefix``; an arithmetic progression from ``high`` (layer 0) to ``low``, rounded by
    :func:`largest_remainder`. Non-increasing, every entry in ``[0, n_prefix]``.
    """
    if n_layer == 1 or budget >= n_prefix:
        return np.full(n_layer, min(budget, n_prefix), dtype=np.int64)
    low = budget / beta
    high = 2 * budget - low
    if high >= n_prefix:
        high, low = n_prefix, 2 * budget - n_prefix
    return largest_remainder(np.linspace(high, low, n_layer), n_layer * budget)


def top_counts(scores: Floats, total: int, n_safe: Ints | None = None) -> Ints:
    """How many of the ``total`` largest entries of all heads together lie in each head.

    Order: score descending, then rank inside the head, then head. Flat-index order instead would hand all slots of
    two identical heads to the first one.

    Args:
        scores: ``[H, n]``; ``-inf`` marks what does not compete. At least ``total`` entries must be finite.
        n_safe: int64 ``[H]``: this many best entries of each head win whatever their score; sum at most ``total``.

    Returns:
        int64 ``[H]``, summing to ``total``.
    """
    n_head, n = scores.shape
    ranked = np.sort(scores, axis=1)[:, ::-1]
    if n_safe is not None:
        ranked = np.where(np.arange(n) < n_safe[:, None], np.inf, ranked)
    # Rank-major order, and `top` prefers lower indices: together they are the tie rule above.
    winners = top(ranked.T.ravel(), total)
    return np.bincount(winners % n_head, minlength=n_head).astype(np.int64)


def mix(adaptive: Ints, uniform: Ints, alpha: float) -> Ints:
    """Ada-KV's safeguard ``(1 - alpha) * adaptive + alpha * uniform`` with the exact total; both sum to the same.

    Every entry stays between its two inputs, so caps that both respect are respected.
    """
    return largest_remainder((1 - alpha) * adaptive + alpha * uniform, int(adaptive.sum()))


def safe_counts(uniform: Ints, alpha: float) -> Ints:
    """``floor(alpha * uniform)``: the best entries of each head that the protect safeguard reserves."""
    # 0.29 * 100 falls just below 29 in binary.
    return np.floor(alpha * uniform + 1e-9).astype(np.int64)
