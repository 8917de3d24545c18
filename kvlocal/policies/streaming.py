"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.allocation import check_counts, uniform_counts
from kvlocal.policies.base import CacheView, LayerView, Policy
from kvlocal.policies.params import choice, validate, whole
from kvlocal.policies.scoring import Ints


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Keeps the first tokens (attention sinks) and the most recent ones.

    Paper: Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, arXiv:2309.17453.

    Formula: with budget ``M``, a head keeps its slots at positions ``< sink`` and its ``M - sink`` newest slots.
    Shapes: reads nothing but the positions, so it works with any kernel and costs nothing.
    Limits: the middle of a long prompt is lost. With ``positions=true`` tokens keep their positions and rotations, and
    a text longer than the model's training length runs into its position limit; ``positions=rolled`` renumbers them at
    every eviction by their place in the cache, as the paper does, and goes on for ever. Keys are then turned, and
    rounded to f16, once per eviction.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"

    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always kept")
    positions: str = choice("true", ["true", "rolled"], help="whether an eviction renumbers the tokens that stay")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def rolls(self) -> bool:
        return self.positions == "rolled"

    @property
    def min_budget(self) -> int:
        return self.sink + 1

    def allocate(self, view: CacheView) -> Ints:
        return uniform_counts(self, view)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        sinks = np.array([np.searchsorted(positions, self.sink) for positions in layer.positions])
        check_counts(layer, budgets, sinks + 1)
        kept = []
        for n, n_sink, budget in zip(layer.n_slots, sinks, budgets, strict=True):
            kept.append(np.r_[0:n_sink, n - (budget - n_sink) : n].astype(np.int64))
        return kept
