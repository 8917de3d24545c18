"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import choice
from kvlocal.policies.parts.scoring import Floats, Ints, reduce_groups, top
from kvlocal.policies.parts.uniform import Uniform
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class Tova(Uniform):
    """Keeps the tokens that the last query attends to, the same ones in every head of a layer.

    Paper: Oren et al., *Transformers are Multi-State RNNs*, arXiv:2401.06104.

    Formula, per layer with budget ``M``: ``S[j] = mean over all query heads of the last query's attention to slot j``;
    the ``M`` largest stay. Equal scores: the older slot stays.
    Shapes: reads ``[n_head, n]`` scores of one query. Cost: O(n_head n) per layer and eviction.
    Limits: one query decides; neither sinks nor recent tokens are protected, not even the newest
    (``newest=keep`` protects that one). Where heads hold different tokens (another policy evicted before), each KV head
    follows its own query heads.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, arXiv:2401.06104"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    newest: str = choice("free", ["free", "keep"], help="whether the newest token always stays")

    @property
    def n_window(self) -> int:
        return 1

    def choose(self, layer: LayerView, budgets: Ints) -> list[Ints]:
        scores: Floats = layer.scores
        alike = all(np.array_equal(p, layer.positions[0]) for p in layer.positions)
        if alike:
            scores = np.broadcast_to(scores.mean(axis=0), (layer.n_head_kv, scores.shape[1]))
        else:
            scores = reduce_groups(scores, layer.n_head_kv, "mean")
        kept = []
        for row, n, budget in zip(scores, layer.n_slots, budgets, strict=True):
            row = row[:n].copy()
            if self.newest == "keep":
                row[-1] = np.inf
            kept.append(top(row, int(budget)))
        return kept
