"""Ada-Pyramid: PyramidKV between layers, Ada-KV inside each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.ada_snapkv import AdaSnapKV
from kvlocal.policies.parts.ranked import BETA
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView


@dataclass(frozen=True, kw_only=True)
class AdaPyramid(AdaSnapKV):
    """Layer budgets of PyramidKV, divided over the heads of each layer as in Ada-SnapKV.

    Paper: Feng et al., *Ada-KV*, arXiv:2407.11550 (the combination), with Cai et al., *PyramidKV*, arXiv:2406.02069.

    Formula: ``c[l]`` as in PyramidKV, then :class:`AdaSnapKV` in layer ``l`` with ``T = H c[l]``. The pyramid
    fixes the layer totals; Ada only moves slots between the heads of one layer. ``alpha=1`` is PyramidKV, ``beta=1``
    is Ada-SnapKV. Shapes, cost and limits are those of the two.

    ``compat="kvpress"`` combines both parts as kvpress defines them; its own wrapper ignores the pyramid, which is
    ``ada-snapkv`` with ``compat=kvpress`` here.
    """

    name: ClassVar[str] = "ada-pyramid"
    paper: ClassVar[str] = "Ada-KV, arXiv:2407.11550; PyramidKV, arXiv:2406.02069"

    beta: int = BETA

    def layer_totals(self, view: CacheView) -> Ints:
        return self.pyramid_totals(view, self.beta, self.compat)
