"""PyramidKV: more slots for lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.parts.allocation import pyramid, pyramid_adakv, pyramid_kvpress, slots_held, spread
from kvlocal.policies.parts.params import whole
from kvlocal.policies.parts.ranked import Ranked
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView
from kvlocal.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidLayers(Ranked):
    """Budgets that fall from layer to layer; see :class:`PyramidKV`."""

    beta: int = whole(20, low=1, help="the last layer gets about 1/beta of the average; 1 makes all layers equal")

    def layer_totals(self, view: CacheView) -> Ints:
        held = slots_held(view)
        n_head = np.array([layer.n_head_kv for layer in view.layers], dtype=np.int64)
        n_prefix = max(int(self.region(layer).size.sum()) // layer.n_head_kv for layer in view.layers)
        always, competing = self.n_always, view.budget - self.n_always
        compat = getattr(self, "compat", None)
        if compat == "adakv":
            per_head = always + pyramid_adakv(competing, self.beta, view.n_layer, n_prefix)
        elif compat == "kvpress":
            per_head = pyramid_kvpress(view.budget, self.beta, view.n_layer, n_prefix + always, always)
        else:
            per_head = always + pyramid(competing, self.beta, view.n_layer, n_prefix)
        totals: Ints = np.minimum(n_head * per_head, held)
        if compat is None:
            totals = spread(min(int(n_head.sum()) * view.budget, int(held.sum())), held, start=totals)
        return totals


@dataclass(frozen=True, kw_only=True)
class PyramidKV(PyramidLayers, SnapKV):
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
