"""Base of the policies that rank tokens by a score: what always stays, equal budgets, the best of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvlocal.policies.parts.allocation import require_budget, spread, uniform_totals
from kvlocal.policies.parts.params import validate, whole
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Floats, Ints, Region, region, top
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Ranked(Policy):
    """Sinks and window stay, the slots between them compete by :meth:`scores`, the same number in every head.

    Subclasses define :meth:`scores`; :class:`~kvlocal.policies.pyramidkv.PyramidLayers` and
    :class:`~kvlocal.policies.ada_snapkv.AdaHeads` divide the budget in other ways. Equal scores: the lower slot wins.
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
        """Scores of the competing slots, ``[H, n]``, -inf elsewhere; the largest are kept."""
        raise NotImplementedError
