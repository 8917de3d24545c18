"""How an answer is compared with what was expected: words found, and overlap with a reference summary."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from kvlocal.errors import KVError, UsageError
from kvlocal.eval.cases import Question, Score

_ROUGE = ("rouge1", "rouge2", "rougeL")


def contains(answer: str, expected: Sequence[str]) -> dict[str, float]:
    """The fraction of ``expected`` that stands somewhere in the answer, in upper or lower case.

    What RULER calls ``string_match_all``; for one expected string it is 0 or 1. Strings are not parted into words:
    ``48213`` is found in ``148213``.

    Raises:
        UsageError: nothing is expected.
    """
    if not expected:
        raise UsageError("There is nothing to look for in the answer; give at least one expected string.")
    return {"score": sum(text.lower() in answer.lower() for text in expected) / len(expected)}


def measure(score: Score, answer: str, question: Question) -> dict[str, float]:
    """An answer's measures: against all that is expected, or (``any_of``) against what it matches best."""
    if not question.any_of:
        return dict(score(answer, question.expected))
    return max((dict(score(answer, [text])) for text in question.expected), key=lambda found: found["score"])


def rouge(answer: str, expected: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L against a reference summary; ``score`` is ROUGE-L.

    Paper: Lin, *ROUGE: A Package for Automatic Evaluation of Summaries*, 2004.

    Formula: ``F = 2 P R / (P + R)``. ROUGE-n counts the n-grams common to both texts, ROUGE-L the longest common
    subsequence of words; P is their share of the answer, R their share of the reference. Words are stemmed (Porter),
    as ``rouge-score`` does it. Of several references the one with the highest ROUGE-L counts.

    Cost: the product of both lengths in words, in Python.

    Raises:
        UsageError: nothing is expected.
        KVError: ``rouge-score`` is not installed.
    """
    if not expected:
        raise UsageError("There is no reference summary to compare the answer with; give at least one.")
    scorer = _scorer()
    measures = [{name: found.fmeasure for name, found in scorer.score(text, answer).items()} for text in expected]
    best = max(measures, key=lambda measure: measure["rougeL"])
    return {name: float(best[name]) for name in _ROUGE} | {"score": float(best["rougeL"])}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise KVError('ROUGE needs rouge-score; install it with pip install "kvlocal[eval]".') from error
    return RougeScorer(list(_ROUGE), use_stemmer=True)
