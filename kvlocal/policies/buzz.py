"""BUZZ: a beehive of local maxima between sinks and window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import choice, validate, whole
from kvlocal.policies.parts.allocation import require_budget
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Floats, Ints
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Buzz(Policy):
    """Keeps one token of every few that leave the window, the most attended, and thins out what it kept before.

    Paper: Zhao et al., *BUZZ: Beehive-structured Sparse KV Cache with Segmented Heavy Hitters for Efficient LLM
    Inference*; the exact rules are those of its code.

    A head's slots are, in order: ``sink`` sinks, ``c`` old ones (survivors of earlier evictions), the fresh ones
    (which left the window since), ``window`` recent ones. Nothing happens until old and fresh together exceed the
    threshold ``T``; then, with ``p = ceil(stride / 2)``::

        old:    every p-th slot, by index (old=localmax: the most attended of every p)
        fresh:  of every ``stride`` consecutive slots the most attended one, the last segment possibly shorter
        c       = ceil(c / p) + ceil(fresh / stride)

    Attention is summed over all queries since a token came and over the query heads of its KV head; of equal ones the
    oldest wins. Segments begin at the first fresh slot, not at a position.

    The size is not a budget but swings between ``sink + window + c`` and ``sink + window + T``; with ``c* = p (T + 1) /
    (stride (p - 1) + p)`` old slots in the steady state, the mean is ``sink + window + (c* + T) / 2``. ``threshold=0``
    solves this for the budget, which then is the mean, and :meth:`peak` the largest size.

    Shapes: reads ``[n_head, n]`` masses per layer, which the page kernels accumulate. Cost: O(H n) every ``T - c``
    tokens, nothing in between. Limits: old tokens thin out geometrically, so beyond about ``(T - c) (1 + log_p((T - c)
    / stride))`` tokens only the first old slot remains. A prompt far longer than the budget is thinned once by
    attention and then by index, on the next steps; ``prefill_fit=yes`` does it at once, by attention.
    """

    name: ClassVar[str] = "buzz"
    paper: ClassVar[str] = "BUZZ (Zhao et al., 2024)"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always kept")
    window: int = whole(160, low=1, help="most recent tokens that are always kept")
    stride: int = whole(5, low=3, help="fresh tokens of which one is kept")
    threshold: int = whole(0, low=0, help="tokens between sinks and window that start an eviction; 0: by the budget")
    old: str = choice("stride", ["stride", "localmax"], help="which of the older tokens stay")
    positions: str = choice("true", ["true", "rolled"], help="whether an eviction renumbers the tokens that stay")
    prefill_fit: str = choice("no", ["no", "yes"], help="bring a long prompt to the steady size at once")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def rolls(self) -> bool:
        return self.positions == "rolled"

    @property
    def min_budget(self) -> int:
        return self.sink + self.window + 1

    @property
    def old_stride(self) -> int:
        """Old slots of which one is kept."""
        return -(-self.stride // 2)

    def middle(self, budget: int) -> int:
        """The threshold ``T``: given, or such that the mean size is ``budget``."""
        if self.threshold:
            return self.threshold
        p = self.old_stride
        share = p / (self.stride * (p - 1) + p)
        return max(1, int((2 * (budget - self.sink - self.window) - share) / (1 + share) + 1e-9))

    def steady(self, budget: int) -> int:
        """Old slots in the steady state, ``c*`` rounded up."""
        p = self.old_stride
        return -(-p * (self.middle(budget) + 1) // (self.stride * (p - 1) + p))

    def peak(self, budget: int) -> int:
        """Most slots per head after a step."""
        return self.sink + self.window + self.middle(budget)

    def limit(self, budget: int, evict_every: int) -> int:
        return self.peak(budget)

    def due(self, held: float, budget: int) -> bool:
        return held > self.peak(budget)

    def allocate(self, view: CacheView) -> Ints:
        if not self.threshold:
            require_budget(self, view)
        return np.array(
            [
                [self._count(len(p), self._old(layer, h), view) for h, p in enumerate(layer.positions)]
                for layer in view.layers
            ],
            dtype=np.int64,
        )

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        held = layer.n_slots
        if np.array_equal(budgets, held):
            return [np.arange(n, dtype=np.int64) for n in held]
        mass = layer.mass.reshape(layer.n_head_kv, -1, layer.mass.shape[-1]).sum(axis=1)
        return [
            self._keep_head(row[:n], int(n), self._old(layer, h), int(budget))
            for h, (row, n, budget) in enumerate(zip(mass, held, budgets, strict=True))
        ]

    def _old(self, layer: LayerView, head: int) -> int:
        """Slots of a head that an earlier eviction left between sinks and window."""
        if layer.evicted_at == 0:
            return 0
        n = int(np.searchsorted(layer.positions[head], layer.evicted_at - self.window))
        return max(0, n - self.sink)

    def _segment(self, n_fresh: int, n_old: int, budget: int) -> int:
        """Fresh slots of which one is kept."""
        if self.prefill_fit == "yes" and n_old == 0:
            return max(self.stride, -(-n_fresh // self.steady(budget)))
        return self.stride

    def _count(self, n: int, n_old: int, view: CacheView) -> int:
        middle = n - self.sink - self.window
        if middle <= self.middle(view.budget):
            return n
        n_fresh = middle - n_old
        segment = self._segment(n_fresh, n_old, view.budget)
        return self.sink + -(-n_old // self.old_stride) + -(-n_fresh // segment) + self.window

    def _keep_head(self, mass: Floats, n: int, n_old: int, budget: int) -> Ints:
        """Slots of one head; ``budget`` is what :meth:`_count` said, so the segment follows from it."""
        if not self.sink + self.window < budget <= n:
            raise ValueError(f"cannot keep {budget} of {n} slots, {self.sink + self.window} of them sinks and window")
        if budget == n:
            return np.arange(n, dtype=np.int64)
        a, b = self.sink + n_old, n - self.window
        n_winners = budget - self.sink - self.window - -(-n_old // self.old_stride)
        segment = self.stride if -(-(b - a) // self.stride) == n_winners else -(-(b - a) // n_winners)
        old = (
            _winners(mass, self.sink, a, self.old_stride)
            if self.old == "localmax"
            else np.arange(self.sink, a, self.old_stride)
        )
        fresh = _winners(mass, a, b, segment)
        return np.r_[0 : self.sink, old, fresh, b:n].astype(np.int64)


def _winners(mass: Floats, begin: int, end: int, segment: int) -> Ints:
    """The slot with the largest mass of every ``segment`` slots in ``[begin, end)``; of equal ones the first."""
    return np.array([i + int(np.argmax(mass[i : min(i + segment, end)])) for i in range(begin, end, segment)], np.int64)
