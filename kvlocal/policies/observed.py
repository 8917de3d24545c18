"""Observed attention: tokens that got more attention than their exposure explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, competing, per_head, reduce_groups
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Observed(Allocated):
    """Keeps the tokens with the highest mean attention over all queries that could see them.

    Source: the idea of H2O (arXiv:2306.14048) without its preference for early tokens, as in kvpress.

    Formula, per KV head: ``S[j] = mean over its query heads of mass[j] / (n_seen - position_j)``, where ``mass[j]`` is
    the attention that slot ``j`` received from all queries so far, its own included.
    Shapes: reads ``[n_head, n]`` masses per layer, which the page kernels accumulate. Cost: one more look at the keys
    per step.
    Limits: the newest tokens are judged on few queries.
    """

    name: ClassVar[str] = "observed"
    paper: ClassVar[str] = "H2O, arXiv:2306.14048 (normalised)"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    window: int = whole(0, low=0, help="most recent tokens that are always kept")

    def scores(self, layer: LayerView, where: Region) -> Floats:
        mass = reduce_groups(layer.mass, layer.n_head_kv, "mean")
        exposure = per_head(layer, lambda h: layer.n_seen - layer.positions[h])
        return competing(mass[:, : exposure.shape[1]] / np.maximum(exposure, 1), where)
