"""Which tokens stay in f16, and how a storage is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.errors import UsageError
from kvlocal.storage.schedule import log_positions
from kvlocal.storage.storage import STORAGES, Storage


def algorithm_1(n_seen: int, window: int) -> list[int]:
    """Token by token, as the paper says it."""
    held: list[int] = []
    for token in range(n_seen):
        if len(held) == 3 * window:
            held = held[0 : 2 * window : 2] + held[2 * window :]
        held.append(token)
    return held


def test_the_papers_example():
    """Its figure 6, window 4, counted from 1."""
    assert (log_positions(12, 4) + 1).tolist() == [*range(1, 13)]
    assert (log_positions(13, 4) + 1).tolist() == [1, 3, 5, 7, 9, 10, 11, 12, 13]
    assert (log_positions(17, 4) + 1).tolist() == [1, 5, 9, 11, 13, 14, 15, 16, 17]


@given(n_seen=st.integers(0, 700), window=st.integers(1, 50))
def test_the_log_set_is_that_of_the_algorithm_token_by_token(n_seen, window):
    held = log_positions(n_seen, window)
    assert held.tolist() == algorithm_1(n_seen, window)
    assert len(held) == n_seen if n_seen <= 3 * window else 2 * window < len(held) <= 3 * window


@given(n_seen=st.integers(0, 500), more=st.integers(0, 100), window=st.integers(1, 40))
def test_what_has_left_the_log_set_does_not_come_back(n_seen, more, window):
    left = np.setdiff1d(np.arange(n_seen), log_positions(n_seen, window))
    assert not np.isin(left, log_positions(n_seen + more, window)).any()


@given(n_seen=st.integers(0, 600), n_window=st.integers(0, 64), tail=st.integers(3, 200), sink=st.integers(0, 40))
def test_what_is_due_is_neither_sink_nor_tail_nor_window(n_seen, n_window, tail, sink):
    for name in ("kv2", "logquant"):
        due = Storage(name, sink=sink, tail=tail).due(n_seen, n_window)
        assert ((due >= sink) & (due < n_seen - n_window)).all()
        stays = np.setdiff1d(np.arange(n_seen), due)
        if name == "kv2":
            assert stays.tolist() == [i for i in range(n_seen) if i < sink or i >= n_seen - max(tail, n_window)]
        else:
            assert set(stays) == {*range(min(sink, n_seen)), *range(max(n_seen - n_window, 0), n_seen)} | set(
                algorithm_1(n_seen, tail // 3)
            )


def test_a_storage_is_read_from_its_name_and_settings():
    assert Storage.parse("kivi:bits=4:group=64") == Storage("kivi", bits=4, group=64)
    assert Storage.parse("logquant:quantizer=token:tail=192", tail=64) == Storage(
        "logquant", tail=192, quantizer="token"
    )
    assert Storage.parse("kv3:sink=4", tail=64) == Storage("kv3", sink=4, tail=64)
    assert [Storage.parse(name).sink for name in STORAGES] == [32] * 5 + [0, 0]


def test_only_our_own_formats_are_rotated_and_only_they_are_centred():
    assert [Storage(name).rotates for name in STORAGES] == [False, True, True, True, True, False, False]
    assert Storage("logquant").formats == ("kivi",)
    assert Storage("logquant", quantizer="token").formats == ("token2",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q5", "no storage 'q5' .* give f16, q8, q4, kv3, kv2, kivi, logquant"),
        ("kv2:bits=4", "'kv2' has no setting 'bits'; it has sink, tail, centre"),
        ("kivi:quantizer=token", "'kivi' has no setting 'quantizer'; it has sink, tail, bits, group"),
        ("kivi:bits=3", "bits is 3 for the storage kivi; give 2 or 4"),
        ("kivi:group=48", "group is 48 .* give 32 or 64"),
        ("kivi:group=many", "group=many is not possible for the storage kivi: give a whole number"),
        ("logquant:quantizer=row", "quantizer is 'row' .* give channel or token"),
        ("logquant:tail=2", "The tail of logquant is 2; it must be 3 or more"),
        ("kv2:sink=-5", "The sink of the storage is -5"),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Storage.parse(text)
