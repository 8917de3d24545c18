"""Slots that share scales are kept or dropped together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.engine.evictor import whole_groups


def test_the_groups_with_the_most_of_it_stay_as_many_as_it_would_fill() -> None:
    groups = np.repeat([-1, 0, 1, 2, -1], [2, 4, 4, 4, 2])
    # 3 + 2 + 3 slots of the groups are kept: two groups, the fuller ones
    keep = np.array([0, 2, 3, 4, 6, 7, 10, 11, 12, 14, 15])
    assert whole_groups(keep, groups).tolist() == [0, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]


def test_of_equally_full_groups_the_newer_one_stays() -> None:
    groups = np.repeat([0, 1, -1], [4, 4, 1])
    assert whole_groups(np.array([0, 1, 4, 5, 8]), groups).tolist() == [4, 5, 6, 7, 8]


def test_a_head_is_never_emptied() -> None:
    assert whole_groups(np.array([1]), np.repeat([0, 1], 4)).tolist() == [0, 1, 2, 3]


def test_what_is_in_no_group_is_left_alone() -> None:
    keep = np.array([1, 3, 4])
    assert whole_groups(keep, np.full(6, -1)).tolist() == keep.tolist()


@given(seed=st.integers(0, 2**32 - 1), n_groups=st.integers(0, 8), n_alone=st.integers(1, 20))
def test_groups_stay_whole_and_fill_no_more_than_what_was_kept(seed: int, n_groups: int, n_alone: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 33, n_groups)
    groups = rng.permutation(np.concatenate([np.repeat(np.arange(n_groups), sizes), np.full(n_alone, -1)]))
    keep = np.flatnonzero(rng.random(len(groups)) < rng.random())
    kept = whole_groups(keep, groups)
    assert (np.diff(kept) > 0).all()
    in_groups = groups[kept][groups[kept] >= 0]
    assert all((in_groups == g).sum() == sizes[g] for g in set(in_groups.tolist()))
    alone = keep[groups[keep] < 0]
    assert set(kept[groups[kept] < 0]) == set(alone)
    if len(alone):
        assert len(kept) <= len(keep)
