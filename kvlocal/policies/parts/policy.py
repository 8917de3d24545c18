"""The base of all policies: numpy in, numpy out, no model and no ctypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from kvlocal.policies.parts.view import CacheView, LayerView


@dataclass
class Decision:
    """Which slots of one layer are kept, and which of those are demoted.

    Attributes:
        keep: slot indices to keep per KV head, int64, ascending.
        demote: by format, which of those kept (indices among them, ascending) are to be stored in it, per KV head.
        centre: ``(first, end)``: demotion subtracts the mean key of the positions ``first <= p < end``, taken at the
            first demotion.
    """

    keep: list[np.ndarray]
    demote: Mapping[str, list[np.ndarray]] = field(default_factory=dict)
    centre: tuple[int, int] = (0, 0)


class Policy:
    """Base of all policies. Subclasses are dataclasses whose fields are their hyper-parameters.

    They define :meth:`allocate` and :meth:`keep`; a policy that also says how slots are stored defines
    :attr:`formats` and :meth:`decide`, and its budget is in bytes.

    Class attributes: ``name`` (as on the command line), ``paper`` (reference), ``needs`` (a set of ``"scores"``,
    ``"queries"``, and ``"mass"`` or ``"last"``: what the cache must gather for it), ``evicts`` (False only for
    ``full``), and ``reads`` (the retriever that belongs to it, if none is given).
    """

    kind: ClassVar[str] = "policy"
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    evicts: ClassVar[bool] = True
    reads: ClassVar[str] = ""

    @property
    def min_budget(self) -> int:
        """Smallest budget (tokens per head) that leaves room for what is always kept."""
        raise NotImplementedError

    @property
    def mass(self) -> Literal["none", "sum", "last"]:
        """What the cache accumulates for this policy."""
        return "sum" if "mass" in self.needs else "last" if "last" in self.needs else "none"

    @property
    def n_window(self) -> int:
        """Window queries that the cache must remember for this policy (0: none)."""
        return 0

    @property
    def rms(self) -> bool:
        """Whether the window scores are root mean squares over the queries instead of means."""
        return False

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that it demotes to, beside f16."""
        return ()

    def due(self, held: float, budget: int) -> bool:
        """True if ``held`` (tokens per head, on average) exceeds ``budget``.

        For policies with :attr:`formats`, ``held`` is page bytes divided by the bytes of one f16 token.
        """
        return held > budget

    def limit(self, budget: int, evict_every: int) -> int:
        """Tokens per head past which a growing sequence is checked again; with ``evict_every`` about every so many."""
        return budget + evict_every - 1

    @property
    def rolls(self) -> bool:
        """Whether an eviction renumbers the kept tokens 0, 1, 2, …; all heads must then keep the same number."""
        return False

    def decide(self, view: CacheView) -> Iterator[Decision]:
        """One :class:`Decision` per layer, in order; asking for the next one releases a layer's scores."""
        budgets = self.allocate(view)
        for layer, counts in zip(view.layers, budgets, strict=True):
            yield Decision(self.keep(layer, counts))
            layer.release()

    def allocate(self, view: CacheView) -> np.ndarray:
        """Slots to keep, int64 ``[n_layer, n_head_kv]``, window and sinks included, summing to ``L * H * budget``
        (less where a head holds fewer slots than that)."""
        raise NotImplementedError

    def keep(self, layer: LayerView, budgets: np.ndarray) -> list[np.ndarray]:
        """Slot indices to keep per KV head, int64, ascending; ``len(result[h]) == budgets[h]``."""
        raise NotImplementedError
