"""The newest tokens: a control for retrievers that look at keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlocal.native.retrieval import Retrieval
from kvlocal.params import whole
from kvlocal.retrieval.retriever import Retriever, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Recent(Retriever):
    """Reads the first tokens and the newest ones, whatever they say: what the others must beat.

    Formula: the first ``sink`` tokens and the last ``budget - sink``.
    """

    name: ClassVar[str] = "recent"
    paper: ClassVar[str] = "control"

    sink: int = whole(32, low=0, help="first tokens that are always read")

    def ends(self, tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        return list(range(64, len(tokens), 64))

    def retrieval(self) -> Retrieval:
        return Retrieval(self.budget, "none", self.sink, max(self.budget - self.sink, 1), n_queries=1)
