"""No eviction: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps every token; the budget is ignored.

    The baseline of every comparison. Memory grows with the sequence.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = ""
    evicts: ClassVar[bool] = False

    @property
    def min_budget(self) -> int:
        return 1

    def allocate(self, view: CacheView) -> Ints:
        return np.array([layer.n_slots for layer in view.layers], dtype=np.int64)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        return [np.arange(n, dtype=np.int64) for n in layer.n_slots]
