"""Scores of answers (strings found, overlap with a reference summary) and the interval of their mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KVError, UsageError
from kvlocal.eval.cases import Question, Score

_ROUGE = ("rouge1", "rouge2", "rougeL")
_BLOCK = 1 << 22  # most values drawn at once, 32 MiB


def contains(answer: str, expected: Sequence[str]) -> dict[str, float]:
    """The fraction of ``expected`` strings found in the answer, ignoring case.

    RULER's ``string_match_all``; 0 or 1 for one expected string. Words are not separated: ``48213`` is found in
    ``148213``.

    Raises:
        UsageError: nothing is expected.
    """
    if not expected:
        raise UsageError("There is nothing to look for in the answer; give at least one expected string.")
    return {"score": sum(text.lower() in answer.lower() for text in expected) / len(expected)}


def measure(score: Score, answer: str, question: Question) -> dict[str, float]:
    """An answer's measures against all expected strings, or (``any_of``) against the one that it matches best."""
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


def interval(
    values: Sequence[float] | npt.NDArray[np.floating],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Paper: Efron, *Bootstrap Methods: Another Look at the Jackknife*, Annals of Statistics 7(1), 1979.

    Formula: ``n_resamples`` times, the mean of ``n`` draws with replacement from the ``n`` values; the interval runs
    from the ``(1 - level) / 2`` to the ``(1 + level) / 2`` quantile of these means.

    Shapes: ``values [n]``. Cost: ``n_resamples * n``. For few values (below some 20) it is too narrow, and if all are
    equal it has no width at all: more cases, not more resamples, help. One value: it twice. None: NaN twice.

    Raises:
        UsageError: ``level`` not between 0 and 1, ``n_resamples`` below 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"level is {level:g}; give a number between 0 and 1.")
    if n_resamples < 1:
        raise UsageError(f"n_resamples is {n_resamples}; give a whole number of at least 1.")
    data = np.asarray(values, np.float64).ravel()
    n = len(data)
    if n < 2:
        value = float(data[0]) if n else float("nan")
        return value, value
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    sizes = [min(step, n_resamples - start) for start in range(0, n_resamples, step)]
    means = np.concatenate([data[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise KVError('ROUGE needs rouge-score; install it with pip install "kvlocal[eval]".') from error
    return RougeScorer(list(_ROUGE), use_stemmer=True)
