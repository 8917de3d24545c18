"""KeyDiff: tokens whose keys differ from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, competing, per_head
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Allocated):
    """Keeps the tokens whose keys point away from the mean direction of all keys.

    Paper: Park et al., *KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments*, arXiv:2504.15364.

    Formula, per KV head with stored (rotated) keys ``k``::

        anchor = mean over all slots of k_j / ||k_j||
        S[j]   = -cos(k_j, anchor)

    Shapes: reads the keys ``[n, d_k]`` head by head. Cost: O(n d) per head; needs no attention, so it works with any
    kernel and after any chunk.
    Limits: knows nothing of the question; what is common in a text is evicted even where it is what is asked for.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff, arXiv:2504.15364"

    window: int = whole(0, low=0, help="most recent tokens that are always kept")

    def scores(self, layer: LayerView, where: Region) -> Floats:
        return competing(per_head(layer, lambda h: difference(layer.keys_values(h)[0])), where)


def difference(keys: Floats) -> Floats:
    """Minus the cosine of every key ``[n, d]`` with the mean of the normalised keys, ``[n]``."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
    anchor = unit.mean(axis=0)
    return -(unit @ anchor) / max(float(np.linalg.norm(anchor)), 1e-12)
