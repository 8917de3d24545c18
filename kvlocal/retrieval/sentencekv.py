"""SentenceKV: sentences by their mean key, compared with the mean query of the sentence that is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlocal.native.retrieval import Retrieval
from kvlocal.params import choice, real, whole
from kvlocal.retrieval.retriever import Retriever, Vocabulary
from kvlocal.retrieval.sentences import literal_ends, sentence_ends


@dataclass(frozen=True, kw_only=True)
class SentenceKV(Retriever):
    """Reads the sentences whose mean key answers the sentence that is being written best.

    Paper: Zhu et al., *SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching*, arXiv:2504.00970.

    Formula: the score of a sentence is the dot product of its mean key and the mean query of the open sentence, the
    queries of a KV head's group added up. The best sentences that fit the budget are read, beside sink, recent and the
    open one; a sentence of the step before gets ``hysteresis`` deviations of the scores more. With ``share=layer`` the
    scores of the heads are put on one scale (less the mean over the sentences, divided by the deviation) and added up.
    Differences from the paper: nothing is dropped, sentences have 4 to 64 tokens and are found by their text, and one
    that is not finished is always read. ``compat=repo``: the authors' delimiters, no limits of length, everything read
    by two tokens of a sentence (one later than there: an end is known with the token behind it), the last sentence
    cut; their code chooses per query head, this per KV head.
    """

    name: ClassVar[str] = "sentencekv"
    paper: ClassVar[str] = "SentenceKV, arXiv:2504.00970"

    sink: int = whole(32, low=0, help="first tokens that are always read")
    recent: int = whole(64, low=1, help="last tokens that are always read")
    min_unit: int = whole(4, low=1, help="least tokens of a sentence")
    max_unit: int = whole(64, low=1, help="most tokens of a sentence")
    share: str = choice("head", ["layer", "head"], help="who chooses: every KV head, or all of a layer together")
    summary: str = choice("mean", ["mean", "bounds"], help="what stands for the keys of a sentence")
    queries: int = whole(0, low=0, help="newest queries whose mean is compared, 0: those of the open sentence")
    cut: str = choice("whole", ["whole", "partial"], help="whether the last sentence is read as far as it fits")
    dense: int = whole(0, low=0, help="first layers that read everything")
    drift: float = real(
        0.25, low=0, high=10, help="growth of the open sentence after which is chosen anew, 0: each token"
    )
    hysteresis: float = real(
        0.05, low=0, high=10, help="deviations by which a sentence must be better to be swapped in"
    )
    compat: str | None = choice(None, [None, "repo"], help="repo: as the authors' code")

    @property
    def n_queries(self) -> int:
        return max(self.max_unit, 64)

    def ends(self, tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
        if self.compat:
            return literal_ends(tokens, vocabulary)
        return sentence_ends(tokens, vocabulary, least=self.min_unit, most=self.max_unit)

    def retrieval(self) -> Retrieval:
        repo = self.compat is not None
        return Retrieval(
            self.budget,
            "bounds" if self.summary == "bounds" else "mean",
            self.sink,
            32 if repo else self.recent,
            n_queries=self.queries,
            min_unit=1 if repo else self.min_unit,
            per_head=repo or self.share == "head",
            partial=repo or self.cut == "partial",
            dense_layers=self.dense,
            full_below=3 if repo else 0,
            drift=0.0 if repo else self.drift,
            hysteresis=0.0 if repo else self.hysteresis,
        )
