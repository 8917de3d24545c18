"""SnapKV: the prompt tokens that the end of the prompt looks at. Base of all policies that rank by window scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.allocation import require_budget, spread, uniform_totals
from kvlocal.policies.base import CacheView, LayerView, Policy
from kvlocal.policies.params import choice, validate, whole
from kvlocal.policies.scoring import Floats, Ints, Region, prefix_scores, region, top


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keeps the tokens that the last window of queries attends to, the same number in every head.

    Paper: Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation*, arXiv:2404.14469.

    Formula, per KV head with ``p`` competing slots (neither sink nor window)::

        s[q, j] = mean over the window rows of softmax(Q K^T / sqrt(d))[row, j]      q: query head
        S[h]    = pool(mean over q in group(h) of s[q])                              over the head's own slots
        keep[h] = sinks + top-b(S[h]) + window,   b = budget - window - sink

    Equal scores: the lower slot wins. Heads that hold fewer slots than the budget leave the rest to the other heads
    of the layer; a layer that holds no more than its budget keeps everything.

    Shapes: reads ``[n_head, n]`` scores per layer, pools ``[H, n]``. Cost: O(n_head n + kernel H n) per layer.
    Limits: the ranking knows only the question that stands in the window; a later, different question may need what
    was evicted.

    ``compat="kvpress"`` pools every query head before averaging the group (kvpress itself runs with ``window=64
    kernel=5 pool=avg``, where the order makes no difference); ``compat="adakv"`` changes nothing here.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv:2404.14469"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    window: int = whole(32, low=1, help="most recent tokens: always kept, and their queries rank the others")
    sink: int = whole(0, low=0, help="tokens at the start of the sequence that are always kept")
    kernel: int = whole(7, low=1, odd=True, help="width of the pooling over neighbouring tokens")
    pool: str = choice("max", ["max", "avg", "none"], help="how neighbouring scores are pooled")
    agg: str = choice("mean", ["mean", "max"], help="how the query heads of one KV head are combined")
    compat: str | None = choice(None, [None, "adakv", "kvpress"], help="follow this implementation to the letter")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def min_budget(self) -> int:
        return self.n_always + 1

    @property
    def n_window(self) -> int:
        return self.window

    @property
    def n_always(self) -> int:
        """Slots of a full head that are kept whatever their score."""
        return self.sink + self.window

    def allocate(self, view: CacheView) -> Ints:
        require_budget(self, view)
        totals = self.layer_totals(view)
        counts = [self.head_counts(layer, int(t)) for layer, t in zip(view.layers, totals, strict=True)]
        return np.array(counts, dtype=np.int64)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        held = layer.n_slots
        if np.array_equal(budgets, held):
            return [np.arange(n, dtype=np.int64) for n in held]
        where = self.region(layer)
        n_best = np.asarray(budgets, dtype=np.int64) - where.always
        if n_best.shape != held.shape or (n_best < 0).any() or (n_best > where.size).any():
            raise ValueError(f"budgets {budgets} do not lie between {where.always} (always kept) and {held} (held)")
        scores = self.scores(layer, where)
        return [
            np.r_[0:start, start + top(row[start:stop], k), stop:n].astype(np.int64)
            for row, start, stop, n, k in zip(scores, where.start, where.stop, held, n_best, strict=True)
        ]

    def layer_totals(self, view: CacheView) -> Ints:
        """Slots to keep per layer, int64 ``[n_layer]``; at least ``n_always`` per head or all that is held."""
        return uniform_totals(view)

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        """Divides a layer's slots over its heads, int64 ``[H]``."""
        return spread(total, layer.n_slots)

    def region(self, layer: LayerView) -> Region:
        """Which slots of each head compete."""
        return region(layer, self.sink, self.window)

    def scores(self, layer: LayerView, where: Region) -> Floats:
        """Pooled scores of the competing slots, ``[H, n]``, -inf elsewhere."""
        return prefix_scores(
            layer, where, kernel=self.kernel, kind=self.pool, agg=self.agg, pool_first=self.compat == "kvpress"
        )
