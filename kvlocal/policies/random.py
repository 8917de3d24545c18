"""Random: the control that no method may lose to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, competing, per_head
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Random(Allocated):
    """Keeps tokens drawn at random, each KV head its own: the control that no method may lose to.

    Formula: every (layer, KV head, position) has a fixed random score from ``seed``, so that a token that survives one
    eviction is not drawn anew by the next. Reads nothing but the positions.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "a control, no paper"

    seed: int = whole(0, low=0, help="another seed draws other tokens")

    def scores(self, layer: LayerView, where: Region) -> Floats:
        def draw(h: int) -> Floats:
            return np.random.default_rng([self.seed, layer.layer, h]).random(layer.n_seen)[layer.positions[h]]

        return competing(per_head(layer, draw), where)
