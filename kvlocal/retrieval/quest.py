"""Quest: pages by the largest score that a key within their bounds can have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlocal.native.retrieval import Retrieval
from kvlocal.params import choice, whole
from kvlocal.retrieval.retriever import Retriever, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Quest(Retriever):
    """Reads the pages whose keys may answer the newest query best.

    Paper: Tang et al., *Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference*, arXiv:2406.10774.

    Formula: of every page of ``page`` tokens the largest and smallest value per channel of its keys is known; its score
    is the sum over the channels of the larger product with the query, added up over the query heads of a KV head. The
    best pages that fit the budget are read, beside the newest tokens; the first ``dense`` layers read everything.
    Differences from the paper: it chooses for every query head, and scores with the query of the same step; here that
    of the step before does, so that more of the newest tokens are always read than its one page.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest, arXiv:2406.10774"

    page: int = whole(16, low=1, help="tokens of a page")
    dense: int = whole(2, low=0, help="first layers that read everything")
    sink: int = whole(0, low=0, help="first tokens that are always read")
    recent: int = whole(64, low=1, help="last tokens that are always read")
    share: str = choice("head", ["layer", "head"], help="who chooses: every KV head, or all of a layer together")

    def ends(self, tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        return list(range(self.page, len(tokens), self.page))

    def retrieval(self) -> Retrieval:
        return Retrieval(
            self.budget,
            "bounds",
            self.sink,
            self.recent,
            n_queries=1,
            min_unit=1,
            per_head=self.share == "head",
            dense_layers=self.dense,
        )
