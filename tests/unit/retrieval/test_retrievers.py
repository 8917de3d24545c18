"""Retrievers by name, and the worked examples of how units are scored and taken."""

from __future__ import annotations

import numpy as np
import pytest
import retrieval_reference as reference

from kvlocal.errors import UsageError
from kvlocal.retrieval import REGISTRY, make_retriever
from kvlocal.retrieval.sentencekv import SentenceKV

KEYS = np.array([(1, 0), (3, 0), (2, 3), (0, 4), (1, 1), (1, -1)], float)
UNITS = [[0, 1, 2], [3], [4, 5]]
QUERIES = np.array([(2, 0), (0, 2)], float)
MEANS = np.array([reference.mean_key(KEYS[unit]) for unit in UNITS])


def test_means_of_sentences() -> None:
    """U3."""
    np.testing.assert_array_equal(MEANS, [(2, 1), (0, 4), (1, 0)])


def test_the_mean_query_finds_another_sentence_than_the_last_one() -> None:
    """U4: the mean of the open sentence's queries, and its last query alone."""
    assert (MEANS @ QUERIES.mean(0)).tolist() == [3, 4, 1]
    assert (MEANS @ QUERIES[-1]).tolist() == [2, 8, 0]


def test_what_a_budget_of_five_reads() -> None:
    """U4b: sink 1, recent 2 of 8 slots. As far as it fits: slot 3 and the first eligible slot of sentence 0; whole
    sentences: slot 3 only, since neither of the others fits."""
    parts = reference.eligible([3, 4, 6], 7, 1, 2)  # one token is still to come
    assert [part.tolist() for part in parts] == [[1, 2], [3], [4, 5]]
    sims, sizes = MEANS @ QUERIES.mean(0), [len(part) for part in parts]
    assert reference.choose(sims, sizes, 2, 1, partial=True) == ([1], (0, 1))
    assert reference.choose(sims, sizes, 2, 1) == ([1], None)


def test_heads_disagree_over_sum_and_maximum() -> None:
    """U6: summing the scores of a group's queries is scoring with their sum."""
    of_heads = np.array([(3, 4, 1), (3, 0, 2)], float)
    assert of_heads.sum(0).tolist() == [6, 4, 3] and of_heads.max(0).tolist() == [3, 4, 2]
    queries = np.random.default_rng(0).normal(size=(4, 2))
    np.testing.assert_allclose(MEANS @ queries.sum(0), sum(MEANS @ query for query in queries))


def test_the_mean_query_settles() -> None:
    """U7: how far it moves falls with the number of queries, so that the choice of the step before is good."""
    queries = np.array([(2, 0), (0, 2), (0, 2), (2, 2)], float)
    means = queries.cumsum(0) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(means, [(2, 0), (1, 1), (2 / 3, 4 / 3), (1, 1.5)])
    steps = np.linalg.norm(np.diff(means, axis=0, prepend=[(0, 0)]), axis=1)
    np.testing.assert_allclose(steps, [2, 1.414214, 0.471405, 0.372678], atol=1e-6)


def test_a_bound_finds_the_page_that_a_mean_does_not() -> None:
    """U10."""
    query = np.array([1.0, -2.0])
    pages = [np.array([(1, 0), (3, -1)], float), np.array([(0, -2), (4, 2)], float)]
    assert [reference.bound(query, reference.bounds(page)) for page in pages] == [5, 8]
    assert [float(reference.mean_key(page) @ query) for page in pages] == [3, 2]
    assert [(page @ query).tolist() for page in pages] == [[1, 5], [4, 0]]


def test_what_does_not_fit_is_passed_over() -> None:
    assert reference.choose([3, 2, 1], [5, 9, 4], 10, 4) == ([0, 2], None)
    assert reference.choose([1, 1, 1], [5, 5, 5], 10, 4) == ([0, 1], None)
    assert reference.choose([3, 2, 1], [5, 9, 1], 8, 4) == ([0], None), "less than a unit is left"


@pytest.mark.parametrize("name", REGISTRY)
def test_a_retriever_by_its_name(name: str) -> None:
    found = make_retriever(name, {"budget": "512"})
    assert found.name == name and found.budget == 512 and str(found) == f"{name} 512"
    assert found.retrieval().budget == 512 and found.n_queries >= 1


def test_what_is_not_as_by_default_is_named() -> None:
    assert str(make_retriever("sentencekv", {"share": "layer", "sink": 4})) == "sentencekv 1024 sink=4 share=layer"


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("sentence", {}, "There is no retriever 'sentence' .did you mean 'sentencekv'.."),
        ("quest", {"pages": "4"}, "Retriever quest has no parameter 'pages' .did you mean 'page'.."),
        ("quest", {"page": "x"}, "page=x is not possible for retriever quest: give a whole number"),
        ("sentencekv", {"budget": 90}, "which a budget of 90 does not hold; give --retrieve-budget 96 or more"),
        ("recent", {"budget": 0}, "budget=0 is not possible"),
    ],
)
def test_what_is_wrong_is_said(name: str, args: dict[str, object], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        make_retriever(name, args)


def test_as_the_authors_code_has_it() -> None:
    asked = SentenceKV(compat="repo").retrieval()
    assert asked.partial and asked.per_head and asked.full_below == 3 and asked.recent == 32


def test_by_attention_nothing_stands_for_a_sentence() -> None:
    found = make_retriever("attention", {"budget": 128, "queries": "8"})
    asked = found.retrieval()
    assert (asked.summary, asked.n_queries, asked.every, found.n_queries) == ("attention", 8, 128, 8)
    assert str(found) == "attention 128 queries=8"
    with pytest.raises(UsageError, match="always reads the first 4 and the last 64 tokens"):
        make_retriever("attention", {"budget": 60})


def test_only_what_is_not_there_is_loaded() -> None:
    """U13."""
    sizes = {1: 30, 4: 18, 7: 10, 8: 33, 9: 15}
    assert reference.delta({1, 4, 7, 9}, {1, 4, 8, 9}, sizes) == (33, {7}, 63 / 96)
