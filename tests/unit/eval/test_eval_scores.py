"""Scores of answers: words found, and ROUGE against values worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.errors import KVError, UsageError
from kvlocal.eval import scores
from kvlocal.eval.cases import Question
from kvlocal.eval.scores import contains, measure, rouge

WORDS = st.lists(st.sampled_from(["river", "stone", "walked", "quickly", "the", "a"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("answer", "expected", "fraction"),
    [
        ("The code is 48213.", ["48213"], 1),
        ("The code is 4821.", ["48213"], 0),
        ("It belongs to BELKA, they say", ["Belka"], 1),
        ("one and three", ["one", "two", "Three", "four"], 0.5),
        ("", ["one"], 0),
    ],
)
def test_contains_is_the_fraction_found_in_any_case(answer: str, expected: list[str], fraction: float) -> None:
    assert contains(answer, expected) == {"score": fraction}
    one = Question("", tuple(expected), 8, any_of=True)
    assert measure(contains, answer, one) == {"score": float(fraction > 0)}
    assert measure(contains, answer, Question("", tuple(expected), 8)) == {"score": fraction}


@given(st.lists(st.text(min_size=1), min_size=1), st.text())
def test_an_answer_that_quotes_everything_has_it_all(expected: list[str], between: str) -> None:
    assert contains(between.join(expected), expected) == {"score": 1}


@pytest.mark.parametrize("score", [contains, rouge])
def test_without_anything_expected_there_is_no_score(score: scores.Any) -> None:
    with pytest.raises(UsageError, match="give at least one"):
        score("answer", [])


def test_rouge_equals_a_count_by_hand() -> None:
    # 4 words in common, in the same order, and 2 bigrams: "the cat", "the mat"
    measures = rouge("the cat saw the mat", ["the cat sat on the mat"])
    precision, recall = 4 / 5, 4 / 6
    f1 = 2 * precision * recall / (precision + recall)
    assert measures == pytest.approx({"rouge1": f1, "rouge2": 2 * 2 / (4 + 5), "rougeL": f1, "score": f1})


def test_rouge_l_minds_the_order_and_rouge_1_does_not() -> None:
    measures = rouge("mat the on sat", ["sat on the mat"])
    assert measures["rouge1"] == 1 and measures["rougeL"] == measures["score"] == 0.25


def test_rouge_compares_stems() -> None:
    assert rouge("they were walking", ["they were walked"])["rouge1"] == 1


def test_of_several_references_the_one_nearest_by_rouge_l_counts() -> None:
    # by ROUGE-1 the first is as near, but its words stand in another order
    references = ["mat the on sat", "nothing of this", "sat on the bench"]
    assert rouge("sat on the mat", references) == rouge("sat on the mat", references[2:])


@given(WORDS, WORDS)
def test_rouge_lies_between_0_and_1_and_is_1_for_the_reference(answer: list[str], reference: list[str]) -> None:
    text = " ".join(reference)
    assert all(0 <= value <= 1 for value in rouge(" ".join(answer), [text]).values())
    assert rouge(text, [text])["score"] == pytest.approx(1)


def test_an_empty_answer_scores_0() -> None:
    assert rouge("", ["a summary"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0, "score": 0}


def test_without_the_library_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    scores._scorer.cache_clear()
    with pytest.raises(KVError, match=r'pip install "kvlocal\[eval\]"'):
        rouge("answer", ["reference"])


def test_the_library_is_imported_only_when_it_is_used() -> None:
    code = "import sys; from kvlocal.eval.scores import contains; contains('a', ['a'])"
    code += "; print('rouge_score' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
