"""The bootstrap interval of a mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.errors import UsageError
from kvlocal.eval import scores
from kvlocal.eval.scores import interval

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=40)


@given(VALUES, st.integers(0, 1000))
def test_the_interval_lies_within_the_values_and_is_the_same_for_a_seed(values: list[float], seed: int) -> None:
    low, high = interval(values, seed=seed, n_resamples=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert interval(np.array(values), seed=seed, n_resamples=200) == (low, high)


@given(VALUES)
def test_a_higher_level_gives_an_interval_that_holds_the_lower_one(values: list[float]) -> None:
    narrow, wide = (interval(values, level=level, n_resamples=200) for level in (0.5, 0.95))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def test_it_is_that_of_the_normal_distribution_for_many_values() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    error = values.std() / math.sqrt(len(values))
    low, high = interval(values, n_resamples=20_000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_two_values_give_the_four_equally_likely_resamples() -> None:
    # means 0, 1/2, 1/2, 1: a quarter of them lies at each end
    assert interval([0, 1], level=0.6) == (0, 1)
    assert interval([0, 1], level=0.4) == (0.5, 0.5)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_equal_values_have_no_width(n: int) -> None:
    assert interval([0.25] * n) == (0.25, 0.25)


def test_no_values_give_no_numbers() -> None:
    assert all(math.isnan(end) for end in interval([]))


def test_many_values_are_drawn_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(64) / 64
    whole = interval(values, n_resamples=500)
    monkeypatch.setattr(scores, "_BLOCK", 64 * 7)
    assert interval(values, n_resamples=500) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [({"level": 1.0}, "level is 1;"), ({"level": 0}, "level is 0;"), ({"n_resamples": 0}, "is 0")],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        interval([0, 1], **options)  # type: ignore[arg-type]
