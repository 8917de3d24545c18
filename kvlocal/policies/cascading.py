"""Cascading KV cache: recent tokens densely, older ones ever more sparsely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.scoring import Floats, Ints, reduce_groups
from kvlocal.policies.parts.uniform import UniformWithSinks
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Cascading(UniformWithSinks):
    """Keeps sinks and a cascade of sub-caches, each of which takes half of the tokens that fall out of the one before.

    Paper: Willette et al., on the cascading KV cache; the exact rules are those of its code.

    A head with budget ``M`` keeps its sinks and ``cascades`` rings of ``W = (M - sink) // cascades`` slots, ring 0
    taking what that leaves over. Until all are full nothing is dropped. Then, with the token at position ``p``::

        carry the token to ring 0
        ring i, if (p - sink) is a multiple of 2^i:  takes what is carried, and carries its oldest to ring i + 1
        otherwise:  what is carried replaces the ring's newest if it has received as much attention; stop
        what is carried past the last ring is dropped

    So ring ``i`` holds one of ``2^i`` neighbours, and all together reach back ``W (2^cascades - 1)`` tokens.
    ``cascades=1`` is streaming.

    The paper compares a moving average of the attention received, with a decay of 0.9999999 per token in its code: that
    ranks as the sum does, which is what is compared here, averaged over the query heads of a KV head. The cascade is
    worked off when a sequence is evicted, token by token with the sums of that moment. How many tokens each ring holds
    follows from the budget alone and rings lie one behind the other in age, so nothing has to be remembered.

    Shapes: reads ``[n_head, n]`` masses per layer, which the page kernels accumulate. Cost: one more look at the keys
    per step; O(n log n) per head and eviction.
    Limits: older tokens received attention from more queries, so they tend to win. Tokens keep their true positions,
    where the paper renumbers them: a text longer than the model's training length runs into its position limit. The
    variant of the code that begins to drop tokens before the rings are full is left out: it holds less than the budget.
    """

    name: ClassVar[str] = "cascading"
    paper: ClassVar[str] = "Cascading KV cache (Willette et al., 2024)"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    cascades: int = whole(4, low=1, help="sub-caches, each twice as sparse as the one before")

    def choose(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        mass = reduce_groups(layer.mass, layer.n_head_kv, "mean")
        return [
            self._keep_head(np.asarray(at, np.int64), row, int(n_sink), int(budget))
            for at, row, n_sink, budget in zip(layer.positions, mass, self.n_sinks(layer), budgets, strict=True)
        ]

    def _keep_head(self, positions: Ints, mass: Floats, n_sink: int, budget: int) -> Ints:
        """Slots of one head. The oldest fill the rings, whether they did before or now; the others come in turn."""
        filled, carried = np.split(np.arange(n_sink, len(positions)), [budget - n_sink])
        times = positions[carried]
        kept = [np.arange(n_sink)]
        end = len(filled)
        for i, size in enumerate(self.sizes(budget - n_sink)):
            if not len(carried):
                kept.append(filled[:end])
                break
            # the token that finds everything full for the first time is taken everywhere
            taken = ((times - self.sink) % (1 << min(i, 31)) == 0) | (times <= budget)
            queue = contend(filled[end - size : end], carried, taken, mass)
            carried, ring = np.split(queue, [np.count_nonzero(taken)])
            times = times[taken]
            kept.append(ring)
            end -= size
        return np.sort(np.concatenate(kept)).astype(np.int64)

    def sizes(self, capacity: int) -> list[int]:
        """Slots of every ring, ring 0 first, where the rings have so many together; none is empty."""
        each = capacity // self.cascades
        return [capacity - each * (self.cascades - 1)] + [each] * (self.cascades - 1 if each else 0)


def contend(ring: Ints, carried: Ints, taken: np.ndarray, mass: Floats) -> Ints:
    """A full ring and, behind it, the slots that it takes of those carried to it, oldest first.

    Each slot that is not taken contends with the newest of that moment, and replaces it if its mass is no smaller.
    """
    rivals = np.r_[ring[-1], carried]
    place = np.r_[0, np.cumsum(taken)]
    by_mass = np.lexsort((mass[rivals], place))  # stable: of equal ones the latest is last
    last = np.flatnonzero(np.diff(place, append=place[-1] + 1))
    return np.r_[ring[:-1], rivals[by_mass[last]]]
