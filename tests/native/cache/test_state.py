"""A sequence saved and restored: the same cache, and no damaged one gets in."""

from __future__ import annotations

from contextlib import suppress

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
    [{"rotate": False, "formats": ("q8",)}, {"n_window": 8}, {"mass": "sum"}, {"kivi_bits": 4}, {"formats": ("q8",)}],
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
        if n + 40 < 2**31 - 1:
            other.decode(random_tokens(other.model, 40, 2), n, 0)
            assert other.n_seen(0) == n + 40
        other.save(0)
        other.truncate(0, 0)
        assert other.stats().allocated_bytes == 0

    damage()
