"""A sequence saved and restored: the same cache, and no damaged one gets in."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import FORMATS

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
N = 300


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def with_everything(context: Context, seed: int = 0) -> None:
    """Sequence 0 evicted raggedly, in all formats, with a mean and attention mass."""
    cache, rng = paged(context), np.random.default_rng(seed)
    context.decode(random_tokens(context.model, N), 0, 0)
    for i, layer in enumerate(cache.layers):
        assert cache.centre(0, i, 0, N)
        # the first 128 as groups of kivi, of what comes then a part, each in a format of its own
        cache.demote(0, i, [np.arange(128)] * layer.n_head_kv, "kivi")
        keep = [
            np.flatnonzero((np.arange(N) >= N - 40) | (rng.random(N) < 0.3 + 0.5 * h))
            for h in range(layer.n_head_kv)
        ]  # fmt: skip
        cache.keep(0, i, keep)
        for f, name in enumerate(name for name in FORMATS[1:] if name != "kivi"):
            some = [np.flatnonzero((kept >= 128) & (kept < N - 40) & (kept % 7 == f)) for kept in keep]
            cache.demote(0, i, some, name)


def open_all(open_model: OpenModel, open_context: OpenContext, **config: object) -> Context:
    model = open_model("llama", **SHAPE)
    return open_context(model, **({"formats": FORMATS[1:], "n_seq_max": 2, "rotate": True, "n_window": 16} | config))


def same(a: Context, b: Context, seq: int = 0) -> None:
    for i in range(len(paged(a).layers)):
        for ours, theirs in zip(paged(a).positions(0, i), paged(b).positions(seq, i), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(paged(a).window_scores(0, i), paged(b).window_scores(seq, i))
    held, restored = paged(a).seq_stats(0), paged(b).seq_stats(seq)
    assert (held.n_seen, held.used_bytes, held.page_bytes) == (
        restored.n_seen,
        restored.used_bytes,
        restored.page_bytes,
    )


@pytest.mark.parametrize("mass", ["none", "sum"])
def test_what_is_restored_goes_on_as_what_was_saved(
    open_model: OpenModel, open_context: OpenContext, mass: str
) -> None:
    context = open_all(open_model, open_context, mass=mass)
    with_everything(context)
    saved = context.save(0)
    other = open_all(open_model, open_context, mass=mass)
    other.decode(random_tokens(other.model, 50, 3), 0, 0)
    for target, seq in ((other, 0), (context, 1)):
        target.restore(seq, saved)
        same(context, target, seq)
        assert target.save(seq)[8:] == saved[8:], "but for the number of the sequence, which comes first"
    more = random_tokens(context.model, 70, 1)
    for a, b in ((context, 0), (other, 0)):
        a.decode(more, N, b)
    np.testing.assert_array_equal(context.logits(), other.logits())
    for i in range(len(paged(context).layers)):
        if mass != "none":
            np.testing.assert_array_equal(paged(context).mass(0, i), paged(other).mass(0, i))
    other.truncate(0, 0)
    assert other.stats().allocated_bytes == 0


def test_a_stock_cache_is_saved_by_the_same_calls(open_model: OpenModel, open_context: OpenContext) -> None:
    a, b = (open_context(open_model("llama", **SHAPE), paged=False) for _ in range(2))
    tokens = random_tokens(a.model, 60)
    a.decode(tokens[:50], 0, 0)
    b.restore(0, a.save(0))
    for context in (a, b):
        context.decode(tokens[50:], 50, 0)
    np.testing.assert_array_equal(a.logits(), b.logits())


@pytest.mark.parametrize(
    "config",
    [{"rotate": False, "formats": ("q8",)}, {"mass": "sum"}, {"kivi_bits": 4}, {"formats": ("q8",)}],
    ids=str,
)
def test_a_cache_with_other_settings_refuses(
    open_model: OpenModel, open_context: OpenContext, config: dict[str, object]
) -> None:
    context = open_all(open_model, open_context)
    with_everything(context)
    other = open_all(open_model, open_context, **config)
    other.decode(random_tokens(other.model, 50, 3), 0, 0)
    with pytest.raises(KVError, match="cannot be restored: .*(settings|remembers|format)"):
        other.restore(0, context.save(0))
    assert other.n_seen(0) == 50, "what was there stays"


def test_a_cache_without_room_says_so(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_all(open_model, open_context)
    with_everything(context)
    other = open_all(open_model, open_context, n_pool_ctx=64, n_seq_max=1)
    with pytest.raises(KVError, match="does not fit|pool is full"):
        other.restore(0, context.save(0))
    assert other.stats().allocated_bytes == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_get_in(open_model: OpenModel, open_context: OpenContext, value: float) -> None:
    """In attention mass, remembered queries, keys and values of every format: it would reach all later tokens."""
    context = open_all(open_model, open_context, mass="sum")
    with_everything(context)
    cache = paged(context)
    whole, other = bytes(context.save(0)), open_all(open_model, open_context, mass="sum")
    n_tables = len(whole) - cache.seq_stats(0).page_bytes - 2 * 16 * 6 * 64 * 4
    one = np.float32(value).tobytes()
    mass = whole.find(cache.mass(0, 0)[0, :1].tobytes())
    assert 0 < mass < n_tables
    # pages come format by format, f16 first; every other format keeps a scale in f16 among its first bytes
    pages, refused = n_tables + 2 * 16 * 6 * 64 * 4, 0
    at = {"mass": mass, "query": n_tables + 400, "value": pages + 64}
    for where in at.values():
        damaged = bytearray(whole)
        word = one if where != at["value"] else np.float16(value).tobytes()
        damaged[where // 4 * 4 : where // 4 * 4 + len(word)] = word
        with pytest.raises(KVError, match="no numbers"):
            other.restore(0, damaged)
        assert other.n_seen(0) == other.stats().allocated_bytes == 0
    word = np.float16(value).tobytes()
    rng = np.random.default_rng(0)
    for where in rng.integers(pages, len(whole), 200) // 2 * 2:
        damaged = bytearray(whole)
        damaged[where : where + 2] = word
        try:
            other.restore(0, damaged)
        except KVError as error:
            refused += "no numbers" in str(error)
            continue
        other.decode([5], N, 0)
        assert np.isfinite(other.logits()).all()
    assert 40 < refused < 200


def test_a_saved_sequence_is_read_where_it_lies(
    open_model: OpenModel, open_context: OpenContext, tmp_path: Path
) -> None:
    """From any buffer, a file's mapping too."""
    context = open_all(open_model, open_context)
    with_everything(context)
    saved = context.save(0)
    (tmp_path / "saved").write_bytes(saved)
    with (tmp_path / "saved").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for buffer in (saved, bytes(saved), bytearray(saved), mapped):
            context.restore(1, buffer)
            same(context, context, 1)
            context.truncate(1, 0)
    with pytest.raises(KVError, match="cannot be restored"):
        context.restore(1, b"")


def test_damage_is_refused_or_harmless(open_model: OpenModel, open_context: OpenContext) -> None:
    """Any byte changed, any length: an error, or a cache that decodes, is saved and freed like any other."""
    context = open_all(open_model, open_context)
    with_everything(context)
    whole, other = context.save(0), open_all(open_model, open_context)
    # what decides comes in front of the queries and the pages
    n_tables = len(whole) - paged(context).seq_stats(0).page_bytes - 2 * 16 * 6 * 64 * 4

    @given(data=st.data())
    @settings(max_examples=200, deadline=None)
    def damage(data: st.DataObject) -> None:
        saved = bytearray(whole)
        kind = data.draw(st.sampled_from(["flip", "word", "cut", "more"]))
        at = data.draw(st.integers(0, data.draw(st.sampled_from([n_tables, len(saved) - 1]))))
        if kind == "flip":
            saved[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "word":
            word = data.draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 31, 32, 33]))
            saved[at // 4 * 4 : at // 4 * 4 + 4] = word.to_bytes(4, "little", signed=True)
        elif kind == "cut":
            del saved[at:]
        else:
            saved += bytes(1 + at % 9)
        with suppress(KVError):
            other.restore(0, bytes(saved))
        n = other.n_seen(0)
        if n + 40 < 2**30 - 1:
            other.decode(random_tokens(other.model, 40, 2), n, 0)
            assert other.n_seen(0) == n + 40
        other.save(0)
        other.truncate(0, 0)
        assert other.stats().allocated_bytes == 0

    damage()


@pytest.mark.parametrize("n_window", [0, 8, 40, 64])
def test_a_context_that_remembers_fewer_queries_takes_the_newest(
    n_window: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama")
    context = open_context(model, n_window=40)
    context.decode(random_tokens(model, 100), 0, 0)
    other = open_context(model, n_window=n_window)
    other.restore(0, context.save(0))
    assert context.cache is not None and other.cache is not None
    n = min(n_window, 40)
    if n:
        np.testing.assert_array_equal(other.cache.queries(0, 1, n), context.cache.queries(0, 1, n))
    for each in (context, other):
        each.decode([5], 100, 0)
    np.testing.assert_array_equal(other.logits(), context.logits())
