"""The price per byte: against brute force, and what every choice keeps to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.policies.parts.allocation import top_counts
from kvlocal.policies.parts.rungs import GONE, Pages, climb, hull

SEEDS = st.integers(0, 2**32 - 1)
COST, ERROR = (16.0, 5.0, 2.0), (0.0, 0.1, 0.3)
LADDER = ((32.0, 17.0, 9.0, 5.5, 4.5), (0.0, 0.003, 0.03, 0.12, 0.2))


def pages(weight: np.ndarray, head: np.ndarray | None = None, ceiling: np.ndarray | None = None) -> Pages:
    """Pages of the given weights; those of a head are ranked by weight."""
    n = len(weight)
    head = np.zeros(n, np.int64) if head is None else head
    ceiling = np.zeros(n, np.int64) if ceiling is None else ceiling
    rank = np.empty(n, np.int64)
    for h in set(head.tolist()):
        own = np.flatnonzero(head == h)
        rank[own[np.argsort(-weight[own], kind="stable")]] = np.arange(len(own))
    return Pages(weight, ceiling, head, rank)


def random_pages(seed: int, n_max: int = 40, n_head: int = 3) -> Pages:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, n_max))
    return pages(rng.exponential(size=n) ** 3, rng.integers(0, n_head, n), rng.integers(0, 3, n))


def cost_of(chosen: np.ndarray, cost: tuple[float, ...] = LADDER[0]) -> float:
    return float(np.append(cost, 0.0)[chosen].sum())


def loss_of(found: Pages, chosen: np.ndarray, error: tuple[float, ...] = LADDER[1]) -> float:
    return float((found.weight * np.append(error, 1.0)[chosen]).sum())


def ladder(found: Pages, budget: float, reserved: float = 0.0) -> np.ndarray:
    return climb(found, [LADDER[0]] * 3, LADDER[1], budget, np.full(3, reserved))


def test_only_rungs_on_the_hull_are_offered():
    assert hull((16, 5, 2), (0, 0.1, 0.3), 0) == [(2, 2, pytest.approx(0.7)), (1, 3, pytest.approx(0.2)), (0, 11, 0.1)]
    # 8 bytes for an error of .25: dearer than what lies on the line between its neighbours
    assert [step[0] for step in hull((16, 8, 2), (0, 0.25, 0.3), 0)] == [2, 0]
    assert [step[0] for step in hull((16, 5, 2), (0, 0.1, 0.3), 1)] == [2, 1]


@given(seed=SEEDS, n=st.integers(1, 8), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_at_the_bytes_that_it_spends_no_other_choice_loses_less(seed, n, share):
    """Without the steps that fill up what is left, the choice is the one of a single price: optimal for its bytes."""
    weight = np.random.default_rng(seed).exponential(size=n)
    found = pages(weight)
    steps = sorted(
        ((w * less / more, more) for w in weight for _, more, less in hull(COST, ERROR, 0)), key=lambda s: -s[0]
    )
    spent = sum(more for _, more in steps[: int(share * len(steps))])
    chosen = climb(found, [COST], ERROR, spent, np.zeros(1))
    best = min(
        loss_of(found, np.array(other), ERROR)
        for other in itertools.product((GONE, 0, 1, 2), repeat=n)
        if cost_of(np.array(other), COST) <= spent
    )
    assert loss_of(found, chosen, ERROR) == pytest.approx(best)


@given(seed=SEEDS, n_head=st.integers(1, 5), total=st.integers(0, 40))
@settings(deadline=None)
def test_with_f16_or_gone_it_is_the_flattened_top_of_ada(seed, n_head, total):
    scores = np.random.default_rng(seed).random((n_head, 8))
    total = min(total, scores.size)
    found = pages(scores.ravel(), np.repeat(np.arange(n_head), 8))
    chosen = climb(found, [(256.0,)] * n_head, (0.0,), total * 256.0, np.zeros(n_head))
    kept = np.bincount(found.head[chosen == 0], minlength=n_head)
    assert kept.tolist() == top_counts(scores, total).tolist()


@given(seed=SEEDS, budget=st.floats(0, 1500))
@settings(deadline=None)
def test_the_budget_holds_and_nothing_more_fits(seed, budget):
    found = random_pages(seed)
    chosen = ladder(found, budget)
    assert cost_of(chosen) <= budget
    assert ((chosen == GONE) | (chosen >= found.ceiling)).all()
    for weight, rung, ceiling in zip(found.weight, chosen, found.ceiling, strict=True):
        steps = hull(*LADDER, ceiling)
        at = [step[0] for step in steps].index(rung) + 1 if rung != GONE else 0
        if at < len(steps) and weight > 0:
            assert cost_of(chosen) + steps[at][1] > budget


@given(seed=SEEDS, low=st.floats(0, 1500), more=st.floats(0, 500))
@settings(deadline=None)
def test_more_bytes_never_lose_more(seed, low, more):
    found = random_pages(seed)
    assert loss_of(found, ladder(found, low + more)) <= loss_of(found, ladder(found, low)) + 1e-9


@given(seed=SEEDS, budget=st.floats(300, 1500))
@settings(deadline=None)
def test_every_head_spends_what_it_is_sure_of(seed, budget):
    found = random_pages(seed)
    chosen = ladder(found, budget, reserved=100.0)
    for head in range(3):
        own = found.head == head
        dearest = max(LADDER[0])
        most = sum(LADDER[0][c] for c in found.ceiling[own])
        assert cost_of(chosen[own]) >= min(100.0 - dearest, most - dearest, 0.0)
        assert cost_of(chosen[own]) > 0 or not own.any()


@given(seed=SEEDS, budget=st.floats(0, 1500))
@settings(deadline=None)
def test_permuting_heads_permutes_the_result(seed, budget):
    found = random_pages(seed)
    turned = Pages(found.weight, found.ceiling, (found.head + 1) % 3, found.rank)
    assert ladder(turned, budget).tolist() == ladder(found, budget).tolist()


def test_equal_gains_go_to_the_better_rank_then_to_the_lower_head():
    found = Pages(np.ones(4), np.zeros(4, np.int64), np.array([1, 1, 0, 0]), np.array([0, 1, 0, 1]))
    chosen = climb(found, [(8.0,)] * 2, (0.0,), 24.0, np.zeros(2))
    assert chosen.tolist() == [0, GONE, 0, 0]


def test_pages_without_weight_are_kept_if_there_is_room():
    found = pages(np.zeros(5))
    assert climb(found, [LADDER[0]], LADDER[1], 1e9, np.zeros(1)).tolist() == [0] * 5
