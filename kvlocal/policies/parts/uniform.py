"""Base of the policies that give every head of every layer the same number of slots and protect none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvlocal.params import validate, whole
from kvlocal.policies.parts.allocation import check_counts, uniform_counts
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass(frozen=True, kw_only=True)
class Uniform(Policy):
    """Subclasses define :meth:`choose`."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def min_budget(self) -> int:
        return 1

    def allocate(self, view: CacheView) -> Ints:
        return uniform_counts(self, view)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        check_counts(layer, budgets)
        if np.array_equal(budgets, layer.n_slots):
            return [np.arange(n, dtype=np.int64) for n in layer.n_slots]
        return self.choose(layer, budgets)

    def choose(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        """As :meth:`keep`, with counts that are possible and some slot to evict."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UniformWithSinks(Uniform):
    """Keeps the first tokens and at least one more."""

    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always kept")

    @property
    def min_budget(self) -> int:
        return self.sink + 1

    def n_sinks(self, layer: LayerView) -> Ints:
        """Sinks held per head, int64 ``[H]``."""
        return np.array([np.searchsorted(positions, self.sink) for positions in layer.positions], dtype=np.int64)

    def keep(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        check_counts(layer, budgets, self.n_sinks(layer) + 1)
        return super().keep(layer, budgets)
