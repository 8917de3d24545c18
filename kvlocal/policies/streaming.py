"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import choice
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.uniform import UniformWithSinks
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Streaming(UniformWithSinks):
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

    positions: str = choice("true", ["true", "rolled"], help="whether an eviction renumbers the tokens that stay")

    @property
    def rolls(self) -> bool:
        return self.positions == "rolled"

    def choose(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        return [
            np.r_[0:n_sink, n - (budget - n_sink) : n].astype(np.int64)
            for n, n_sink, budget in zip(layer.n_slots, self.n_sinks(layer), budgets, strict=True)
        ]
