"""The operators that change pages inside a graph: new tokens, window queries, slots that move."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.doctor.kernels import PAGE, POOL_ALIGNMENT, STREAM, AttnParams, MoveParams, Pages
from kvlocal.doctor.operators import Graph
from kvlocal.doctor.rows import ROWS, decode_rows, encode_rows
from kvlocal.native.formats import PAGE_SLOTS


def changed(name: str, target: np.ndarray, args: list[np.ndarray], params: ctypes.Structure, n_threads: int) -> Any:
    """The target after the operator."""
    graph = Graph(2 * target.nbytes + sum(2 * a.nbytes for a in args))
    try:
        tensor = graph.tensor(target)
        graph.run(n_threads, graph.change(name, tensor, [graph.tensor(a) for a in args], params))
        return graph.read(tensor, *target.shape, dtype=target.dtype)
    finally:
        graph.close()


def table_of(pages: Pages, streams: Any, listed: Any) -> np.ndarray:
    return np.concatenate([part.view(np.int32).ravel() for part in (pages.refs(), streams, listed)])


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_append_stores_new_tokens_where_the_table_says(data: st.DataObject) -> None:
    """Tails that are part full, several sequences and heads; nothing else is touched."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_seqs, n_heads, n_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 31, 70]))
    d_k, d_v = draw(st.sampled_from([64, 80])), draw(st.sampled_from([64, 96]))
    past = rng.integers(0, 100, n_seqs * n_heads)
    n_pages = [-(-int(n + n_tokens) // PAGE_SLOTS) for n in past]
    pages = Pages(sum(n_pages), d_k, d_v)
    order = rng.permutation(sum(n_pages))
    streams, listed, done = np.zeros(len(past), STREAM), [], 0
    for i, n in enumerate(past):
        # pages of the past may be missing from the list, those of the new tokens never are
        shown = [p for p in range(n_pages[i]) if (p + 1) * PAGE_SLOTS > n or rng.random() < 0.5]
        streams[i] = (n + n_tokens, len(listed), len(shown), -1, 1, 0, (0, 0))
        listed += [(int(order[done + p]), 2**32 - 1, p * PAGE_SLOTS, 0) for p in shown]
        done += n_pages[i]
    k, v = (rng.standard_normal((n_seqs * n_tokens, n_heads, d)).astype(np.float32) for d in (d_k, d_v))
    before = pages.data()
    params = AttnParams(0, len(pages.kinds), n_seqs, n_heads, 1, 0, 1.0, 0.0, d_v, 0)
    table = table_of(pages, streams, np.array(listed, PAGE))
    got = changed("kvl_pages_append", before, [k, v, table], params, draw(st.integers(1, 3)))

    want = before.copy().view(np.uint8)
    stored = want[: sum(n_pages) * PAGE_SLOTS * 2 * (d_k + d_v)].reshape(sum(n_pages), -1)
    first = np.r_[0, np.cumsum(n_pages)[:-1]]
    for i, n in enumerate(past):
        for t in range(n_tokens):
            page, j = order[first[i] + (n + t) // PAGE_SLOTS], (n + t) % PAGE_SLOTS
            row = (i // n_heads * n_tokens + t, i % n_heads)
            stored[page, 2 * d_k * j : 2 * d_k * (j + 1)] = encode_rows("f16", k[row][None])[0]
            at = 2 * d_k * PAGE_SLOTS + 2 * d_v * j
            stored[page, at : at + 2 * d_v] = encode_rows("f16", v[row][None])[0]
    np.testing.assert_array_equal(got.view(np.uint8), want)


@pytest.mark.parametrize("n_tokens", [1, 3, 8, 20])
def test_window_remembers_the_newest_queries(n_tokens: int) -> None:
    """Query p of a sequence lies in row p % 8 of its eight."""
    width, n_seqs, row = 8, 2, 3 * 64
    rng = np.random.default_rng(n_tokens)
    q = rng.standard_normal((n_seqs * n_tokens, 3, 64)).astype(np.float32)
    streams = np.zeros(n_seqs, STREAM)
    streams["number"], streams["window"] = [6, 101], [16, 0]  # positions 5 and 100, the third and the first ring
    before = rng.standard_normal((24, row)).astype(np.float32)
    pages = Pages(1, 64, 64)
    params = AttnParams(0, len(pages.kinds), n_seqs, 1, 1, width, 1.0, 0.0, 64, 0)
    args = [q, table_of(pages, streams, np.zeros(1, PAGE))]
    got = changed("kvl_pages_window", before, args, params, 2)
    want = before.copy()
    for s, (pos, ring) in enumerate([(5, 16), (100, 0)]):
        for t in range(max(0, n_tokens - width), n_tokens):
            want[ring + (pos + t) % width] = q[s * n_tokens + t].ravel()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("pair", [("f16", "f16"), ("kv3", "kv2"), ("q8", "q8")])
def test_moves_go_one_after_the_other(pair: tuple[str, str]) -> None:
    """Slots close up within a page and from the next one, keys and values alike; other pools stay as they are."""
    d_k, d_v = 64, 128
    rng = np.random.default_rng(3)
    pages = Pages(3, d_k, d_v)
    rows = [rng.standard_normal((3 * PAGE_SLOTS, d)).astype(np.float32) for d in (d_k, d_v)]
    for page in range(3):
        part = slice(page * PAGE_SLOTS, (page + 1) * PAGE_SLOTS)
        pages.store(pair, page, rows[0][part], rows[1][part])
    base = int(pages.refs()["base"][pages.kinds.index(pair)])
    moves = [(0, 5, 10), (10, 40, 8), (18, 33, 2), (64, 70, 20)]  # to, from, how many
    params = MoveParams(ROWS.index(pair[0]), ROWS.index(pair[1]), d_k, d_v)
    items = np.array([(base, *move) for move in moves], np.int32)
    before = pages.data()
    got = changed("kvl_pages_move", before, [items], params, 2)
    source = np.arange(3 * PAGE_SLOTS)
    for to, start, n in moves:
        source[to : to + n] = source[start : start + n].copy()
    sizes = [encode_rows(row, np.zeros((1, d))).shape[1] for row, d in zip(pair, (d_k, d_v), strict=True)]
    at = POOL_ALIGNMENT * base
    for page in range(3):
        wanted = source[page * PAGE_SLOTS : (page + 1) * PAGE_SLOTS]
        for row, size, x in zip(pair, sizes, rows, strict=True):
            stored = got[at : at + PAGE_SLOTS * size].view(np.uint8).reshape(PAGE_SLOTS, size)
            np.testing.assert_array_equal(stored, encode_rows(row, x)[wanted])
            assert np.isfinite(decode_rows(row, stored)).all()
            at += PAGE_SLOTS * size
    np.testing.assert_array_equal(got[: POOL_ALIGNMENT * base], before[: POOL_ALIGNMENT * base])
    np.testing.assert_array_equal(got[at:], before[at:])
