"""Base of the policies whose score can be combined with every way to divide the budget."""

from __future__ import annotations

from dataclasses import dataclass

from kvlocal.params import choice
from kvlocal.policies.parts.ranked import ALPHA, BETA, SAFEGUARD, Ranked
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Allocated(Ranked):
    """Ranked by :meth:`scores`; ``allocation`` says how layers and heads share the budget.

    ``uniform``: all alike; ``pyramid``: as :class:`~kvlocal.policies.pyramidkv.PyramidKV` between layers; ``ada``: as
    :class:`~kvlocal.policies.ada_snapkv.AdaSnapKV` between the heads of a layer; ``ada-pyramid``: both.
    """

    beta: int = BETA
    alpha: float = ALPHA
    safeguard: str = SAFEGUARD
    allocation: str = choice(
        "uniform", ["uniform", "pyramid", "ada", "ada-pyramid"], help="how layers and heads share the budget"
    )

    def layer_totals(self, view: CacheView) -> Ints:
        return self.pyramid_totals(view, self.beta) if "pyramid" in self.allocation else super().layer_totals(view)

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        if "ada" not in self.allocation:
            return super().head_counts(layer, total)
        return self.ada_counts(layer, total, self.alpha, self.safeguard)
