"""Base of the policies whose score can be combined with every way to divide the budget."""

from __future__ import annotations

from dataclasses import dataclass

from kvlocal.policies.ada_snapkv import AdaHeads
from kvlocal.policies.parts.allocation import spread, uniform_totals
from kvlocal.policies.parts.params import choice
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView, LayerView
from kvlocal.policies.pyramidkv import PyramidLayers


@dataclass(frozen=True, kw_only=True)
class Allocated(AdaHeads, PyramidLayers):
    """Ranked by :meth:`scores`; ``allocation`` says how layers and heads share the budget.

    ``uniform``: all alike; ``pyramid``: as :class:`~kvlocal.policies.pyramidkv.PyramidKV` between layers; ``ada``: as
    :class:`~kvlocal.policies.ada_snapkv.AdaSnapKV` between the heads of a layer; ``ada-pyramid``: both.
    """

    allocation: str = choice(
        "uniform", ["uniform", "pyramid", "ada", "ada-pyramid"], help="how layers and heads share the budget"
    )

    def layer_totals(self, view: CacheView) -> Ints:
        return super().layer_totals(view) if "pyramid" in self.allocation else uniform_totals(view)

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        return super().head_counts(layer, total) if "ada" in self.allocation else spread(total, layer.n_slots)
