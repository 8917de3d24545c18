"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import real
from kvlocal.policies.parts.scoring import Ints, top
from kvlocal.policies.parts.uniform import Uniform
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class H2O(Uniform):
    """Keeps the tokens that received the most attention of all queries so far, and the most recent ones.

    Paper: Zhang et al., *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models*,
    arXiv:2306.14048.

    Formula, per KV head with budget ``M``::

        r       = max(1, floor(recent * M))
        acc[j]  = sum over the head's query heads of the attention that slot j received from all queries so far
        keep[h] = top-(M - r) of acc over all but the last r slots, and those

    The sums are carried along by what stays, never reset and never normalised. Equal sums: the older slot stays.
    Shapes: reads ``[n_head, n]`` masses per layer, which the page kernels accumulate (over a prompt block by block,
    with bounded memory). Cost: one more look at the keys per step, O(n) per head and eviction.
    Limits: early tokens gain from being seen by more queries. No sinks are forced: their attention keeps them.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, arXiv:2306.14048"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    recent: float = real(0.5, low=0, high=1, help="share of the budget for the most recent tokens")

    def choose(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        mass = layer.mass.reshape(layer.n_head_kv, -1, layer.mass.shape[-1]).sum(axis=1)
        kept = []
        for acc, n, budget in zip(mass, layer.n_slots, budgets, strict=True):
            r = min(max(1, int(self.recent * budget + 1e-9)), int(budget))
            kept.append(np.r_[top(acc[: n - r], int(budget) - r), n - r : n].astype(np.int64))
        return kept
