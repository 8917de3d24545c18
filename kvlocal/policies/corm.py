"""CORM: tokens that a recent query found important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import choice, real, whole
from kvlocal.policies.parts.allocation import require_budget
from kvlocal.policies.parts.ranked import SAFEGUARD, Ranked
from kvlocal.policies.parts.scoring import Floats, Ints, Region, competing, per_head, reduce_groups
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Corm(Ranked):
    """Keeps the tokens that one of the last queries gave at least an average share of its attention.

    Paper: Dai et al., *CORM: Cache Optimization with Recent Message for Large Language Model Inference*,
    arXiv:2404.15949. No code of the authors is known; the formulation is ours.

    Formula, per KV head with ``last[j]`` = the last query of any of its query heads whose probability for slot ``j``
    was at least ``1 / (slots that it saw)``::

        keep = slots with n_seen - last[j] <= queries  +  window

    How much that is depends on the text. ``queries=0``, the default, solves ``queries`` for the budget, per layer: the
    slots that were important most recently stay (of equally recent ones the newer), as many as the layer's budget, and
    heads get what falls to them. With ``queries`` given the size follows from the text, an eviction starts at ``queries
    + window`` slots, and the budget only caps it: ``cap=yes`` evicts the excess by the same order, ``cap=no`` nothing.

    Shapes: reads ``[n_head, n]`` floats per layer, which the page kernels write. Cost: one more look at the keys per
    step; O(H n log n) per eviction.
    Limits: all queries count alike, whatever they are about. The paper's own ``queries`` and ``window`` are unknown
    here (256 and 256 in a second-hand account).
    """

    name: ClassVar[str] = "corm"
    paper: ClassVar[str] = "CORM, arXiv:2404.15949"
    needs: ClassVar[frozenset[str]] = frozenset({"last"})

    alpha: float = real(0.0, low=0, high=1, help="share of the budget that is divided equally among the heads")
    safeguard: str = SAFEGUARD
    queries: int = whole(0, low=0, help="queries of which one must have looked at a token; 0: solved for the budget")
    cap: str = choice("yes", ["yes", "no"], help="with queries: whether the budget is an upper bound")

    @property
    def min_budget(self) -> int:
        return 1 if self.queries and self.cap == "no" else super().min_budget

    def due(self, held: float, budget: int) -> bool:
        if not self.queries:
            return super().due(held, budget)
        return held > self.queries + self.window or (self.cap == "yes" and held > budget)

    def limit(self, budget: int, evict_every: int) -> int:
        start = self.queries + self.window if self.queries else budget
        return super().limit(min(start, budget) if self.cap == "yes" else start, evict_every)

    def allocate(self, view: CacheView) -> Ints:
        if not self.queries:
            return super().allocate(view)
        if self.cap == "yes":
            require_budget(self, view)
        return np.array([self._counts(layer, view.budget) for layer in view.layers], dtype=np.int64)

    def _counts(self, layer: LayerView, budget: int) -> Ints:
        where = self.region(layer)
        important = self.scores(layer, where) >= layer.n_seen - self.queries + 1
        counts: Ints = where.always + important.sum(axis=1)
        total = layer.n_head_kv * budget
        return self.head_counts(layer, total) if self.cap == "yes" and counts.sum() > total else counts

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        return self.ada_counts(layer, total, self.alpha, self.safeguard)

    def scores(self, layer: LayerView, where: Region) -> Floats:
        last = reduce_groups(layer.mass, layer.n_head_kv, "max").astype(np.float64)
        # `last` is whole: the position decides only between slots that are equally recent
        order = per_head(layer, lambda h: layer.positions[h] / (layer.n_seen + 1))
        return competing(last[:, : order.shape[1]] + order, where)
