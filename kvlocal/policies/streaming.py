"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.allocation import require_budget, spread, uniform_totals
from kvlocal.policies.base import CacheView, LayerView, Policy
from kvlocal.policies.params import validate, whole
from kvlocal.policies.scoring import Ints


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Keeps the first tokens (attention sinks) and the most recent ones.

    Paper: Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, arXiv:2309.17453.

    Formula: with budget ``M``, a head keeps its slots at positions ``< sink`` and its ``M - sink`` newest slots.
    Shapes: reads nothing but the positions, so it works with any kernel and costs nothing.
    Limits: the middle of a long prompt is lost. Tokens keep their true positions (and rotations), where the paper
    renumbers them by their place in the cache; a text much longer than the model's training length therefore
    still runs into the model's position limit.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"

    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always kept")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def min_budget(self) -> int:
        return self.sink + 1

    def allocate(self, view: CacheView) -> Ints:
        require_budget(self, view)
        counts = [spread(int(t), layer.n_slots) for t, layer in zip(uniform_totals(view), view.layers, strict=True)]
        return np.array(counts, dtype=np.int64)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        kept = []
        for positions, budget in zip(layer.positions, budgets, strict=True):
            n, n_sink = len(positions), int(np.searchsorted(positions, self.sink))
            if not min(n, n_sink + 1) <= budget <= n:
                raise ValueError(f"cannot keep {budget} of {n} slots, {n_sink} of them sinks")
            kept.append(np.r_[0:n_sink, n - (budget - n_sink) : n].astype(np.int64))
        return kept
