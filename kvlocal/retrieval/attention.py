"""By the attention itself: what the newest queries look at is read until the next question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlocal.native.retrieval import Retrieval
from kvlocal.params import choice, whole
from kvlocal.retrieval.retriever import Retriever, Vocabulary
from kvlocal.retrieval.sentences import sentence_ends


@dataclass(frozen=True, kw_only=True)
class Attention(Retriever):
    """Reads the sentences that get most of the attention of the question's end, and holds on to them.

    Our own. The choice is that of SnapKV (arXiv:2404.14469), for sentences and without dropping the others: when a text
    was read, the attention of its last ``queries`` queries over all that is held is computed, as it is for an eviction,
    and every KV head reads the sentences with most of it per token, within the budget. Tokens in between cost nothing
    but what they read; after ``every`` tokens of an answer it is chosen anew. Nothing stands for the sentences.
    """

    name: ClassVar[str] = "attention"
    paper: ClassVar[str] = "as SnapKV, arXiv:2404.14469, chooses"

    queries: int = whole(16, low=1, help="newest queries whose attention is looked at")
    every: int = whole(128, low=0, help="tokens of an answer after which is chosen anew, 0: none")
    sink: int = whole(4, low=0, help="first tokens that are always read")
    recent: int = whole(64, low=1, help="last tokens that are always read")
    min_unit: int = whole(4, low=1, help="least tokens of a sentence")
    max_unit: int = whole(64, low=1, help="most tokens of a sentence")
    share: str = choice("head", ["layer", "head"], help="who chooses: every KV head, or all of a layer together")

    def ends(self, tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        return sentence_ends(tokens, vocabulary, least=self.min_unit, most=self.max_unit)

    def retrieval(self) -> Retrieval:
        return Retrieval(
            self.budget,
            "attention",
            self.sink,
            self.recent,
            n_queries=self.queries,
            min_unit=1,
            per_head=self.share == "head",
            every=self.every,
        )
