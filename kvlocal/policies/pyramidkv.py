"""PyramidKV: more slots for lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.parts.ranked import BETA
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView
from kvlocal.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Like SnapKV, with more slots in the lower layers and fewer in the upper ones.

    Paper: Cai et al., *PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling*,
    arXiv:2406.02069.

    Formula, with ``b = budget - window - sink`` and ``p`` competing slots per head (the most that any layer holds)::

        low = b / beta;  high = 2 b - low;  where high >= p: high = p, low = 2 b - p
        c[l] = high - l (high - low) / (L - 1),  rounded by largest remainder: sum(c) == L b, never increasing
        keep[l, h] = sinks + top-c[l] + window

    ``beta=1`` is SnapKV. A layer that holds less than its share (after an earlier eviction) leaves the rest to the
    other layers. Shapes and cost as SnapKV.
    Limits: the shape is fixed, not measured on the prompt; with a budget close to the window it is nearly flat.

    ``compat="adakv"`` uses the integer step of that repository and ``compat="kvpress"`` rounds every layer on its
    own (and falls back to equal layers where the smallest would not hold the window): both miss the total a little.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV, arXiv:2406.02069"

    beta: int = BETA

    def layer_totals(self, view: CacheView) -> Ints:
        return self.pyramid_totals(view, self.beta, self.compat)
