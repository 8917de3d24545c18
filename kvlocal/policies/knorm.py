"""Knorm: tokens with small keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, competing, per_head
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Knorm(Allocated):
    """Keeps the tokens whose keys have the smallest norm.

    Paper: Devoto et al., *A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression*, arXiv:2406.11430.

    Formula, per KV head: ``S[j] = -||k_j||_2`` on the stored keys (rotation does not change a norm).
    Shapes: reads the keys ``[n, d_k]`` head by head. Cost: O(n d) per head; needs no attention, so it works with any
    kernel and after any chunk.
    Limits: knows nothing of the question. The paper protects nothing and leaves the first two layers whole; here every
    layer is evicted, and ``window`` and ``sink`` protect what they are set to.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Knorm, arXiv:2406.11430"

    window: int = whole(0, low=0, help="most recent tokens that are always kept")

    def scores(self, layer: LayerView, where: Region) -> Floats:
        return competing(per_head(layer, lambda h: -np.linalg.norm(layer.keys_values(h)[0], axis=1)), where)
