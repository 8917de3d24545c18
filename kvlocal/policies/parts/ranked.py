"""Base of the policies that rank tokens by a score: what always stays, equal budgets, the best of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvlocal.params import choice, real, validate, whole
from kvlocal.policies.parts import allocation, compat
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Floats, Ints, Region, region, top
from kvlocal.policies.parts.view import CacheView, LayerView

# fields of the policies that share their budget unevenly
BETA = whole(20, low=1, help="the last layer gets about 1/beta of the average; 1 makes all layers equal")
ALPHA = real(0.2, low=0, high=1, help="share of the budget that is divided equally; 1 is SnapKV")
SAFEGUARD = choice("mix", ["mix", "protect"], help="how alpha protects heads from starving")


@dataclass(frozen=True, kw_only=True)
class Ranked(Policy):
    """Sinks and window stay, the slots between them compete by :meth:`scores`, the same number in every head.

    Subclasses define :meth:`scores`; :meth:`layer_totals` and :meth:`head_counts` divide the budget, in other ways with
    :meth:`pyramid_totals` and :meth:`ada_counts`. Equal scores: the lower slot wins.
    Heads that hold fewer slots than the budget leave the rest to the other heads of the layer; a layer that holds no
    more than its budget keeps everything.
    """

    window: int = whole(32, low=1, help="most recent tokens that are always kept")
    sink: int = whole(0, low=0, help="tokens at the start of the sequence that are always kept")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def min_budget(self) -> int:
        return self.n_always + 1

    @property
    def n_always(self) -> int:
        """Slots of a full head that are kept whatever their score."""
        return self.sink + self.window

    def allocate(self, view: CacheView) -> Ints:
        allocation.require_budget(self, view)
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
        return allocation.uniform_totals(view)

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        """Divides a layer's slots over its heads, int64 ``[H]``."""
        return allocation.spread(total, layer.n_slots)

    def pyramid_totals(self, view: CacheView, beta: int, rules: str | None = None) -> Ints:
        """As :meth:`layer_totals`, with shares that fall as :class:`~kvlocal.policies.pyramidkv.PyramidKV` says."""
        held = allocation.slots_held(view)
        n_head = np.array([layer.n_head_kv for layer in view.layers], dtype=np.int64)
        n_prefix = max(int(self.region(layer).size.sum()) // layer.n_head_kv for layer in view.layers)
        always, competing = self.n_always, view.budget - self.n_always
        if rules == "adakv":
            per_head = always + compat.pyramid_adakv(competing, beta, view.n_layer, n_prefix)
        elif rules == "kvpress":
            per_head = compat.pyramid_kvpress(view.budget, beta, view.n_layer, n_prefix + always, always)
        else:
            per_head = always + allocation.pyramid(competing, beta, view.n_layer, n_prefix)
        totals: Ints = np.minimum(n_head * per_head, held)
        total = totals.sum() if rules else min(n_head.sum() * view.budget, held.sum())
        return allocation.spread(int(total), held, start=totals)

    def ada_counts(self, layer: LayerView, total: int, alpha: float, safeguard: str, rules: str | None = None) -> Ints:
        """As :meth:`head_counts`, heads competing as :class:`~kvlocal.policies.ada_snapkv.AdaSnapKV` says."""
        held = layer.n_slots
        if total >= held.sum():
            return held
        where = self.region(layer)
        scores = self.scores(layer, where)
        n_best = total - int(where.always.sum())
        uniform = allocation.spread(total, held) - where.always
        if rules == "kvpress":
            reserved = int(total // layer.n_head_kv * alpha) - where.always
            best = allocation.top_counts(scores, n_best, n_safe=np.clip(reserved, 0, where.size))
        elif rules == "adakv":
            best = compat.mix_adakv(allocation.top_counts(scores, n_best), n_best // layer.n_head_kv, alpha)
            best = np.minimum(best, where.size)
        elif safeguard == "protect":
            best = allocation.top_counts(scores, n_best, n_safe=allocation.safe_counts(uniform, alpha))
        else:
            best = allocation.mix(allocation.top_counts(scores, n_best), uniform, alpha)
        return where.always + best

    def region(self, layer: LayerView) -> Region:
        """Which slots of each head compete."""
        return region(layer, self.sink, self.window)

    def scores(self, layer: LayerView, where: Region) -> Floats:
        """Scores of the competing slots, ``[H, n]``, -inf elsewhere; the largest are kept."""
        raise NotImplementedError
