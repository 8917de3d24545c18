"""What callers get wrong: one sentence each, and the cache as it was."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.errors import KVError, UsageError
from kvlocal.native import library
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.structs import KvlSeqStats

N = 60


@pytest.fixture
def context(open_model: OpenModel, open_context: OpenContext) -> Context:
    """60 tokens of a model of two layers with two KV heads and four query heads."""
    context = open_context(open_model("llama"), n_seq_max=2, formats=("q8", "kivi"), mass="sum")
    context.decode(random_tokens(context.model, N), 0, 0)
    return context


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


TAKE: dict[str, Callable[[PagedCache, Any], object]] = {
    "keep": lambda cache, slots: cache.keep(0, 0, slots),
    "demote": lambda cache, slots: cache.demote(0, 0, slots, "q8"),
    "select": lambda cache, slots: cache.select(0, 0, slots),
}


@pytest.mark.parametrize("take", TAKE)
@pytest.mark.parametrize(
    ("slots", "what"),
    [
        ([np.arange(5)], "slots for 1 heads, but layer 0 has 2 KV heads"),
        ([np.arange(5)] * 3, "slots for 3 heads, but layer 0 has 2 KV heads"),
        ([], "slots for 0 heads, but layer 0 has 2 KV heads"),
        ([np.arange(5), np.arange(5) + 0.5], "KV head 1.* whole numbers, not float64"),
        ([np.ones(N, bool)] * 2, "KV head 0.* whole numbers, not bool"),
        ([np.array(["1"]), np.arange(5)], "KV head 0.* whole numbers, not <U1"),
        ([np.arange(6).reshape(2, 3), np.arange(5)], "KV head 0.* shape \\(2, 3\\)"),
        ([np.array([1, 2**32 + 2]), np.arange(5)], "KV head 0.* from 1 to 4294967298"),
        ([np.array([1, 2**63], np.uint64), np.arange(5)], "KV head 0.* to 9223372036854775808"),
        ([np.arange(5), np.arange(N + 1)], f"{N + 1} of {N} slots.*KV head 1"),
        ([np.arange(5), np.array([3, 2])], "ascending.*KV head 1"),
        ([np.arange(5), np.array([-1, 2])], "below 60, got -1.*KV head 1"),
    ],
)
def test_slots_of_a_wrong_shape_or_kind(take: str, slots: Any, what: str, context: Context) -> None:
    before = context.save(0)
    with pytest.raises(KVError, match=what):
        TAKE[take](paged(context), slots)
    assert context.save(0) == before


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda c: c.demote_due(0, 0, np.array([3, 1]), "q8"), "ascending"),
        (lambda c: c.demote_due(0, 0, np.array([0.5]), "q8"), "whole numbers, not float64"),
        (lambda c: c.demote_due(0, 0, np.arange(4), "q8", -1), "not negative"),
        (lambda c: c.demote(0, 0, [np.arange(4)] * 2, "kv2"), "not asked for"),
        (lambda c: c.set_mass(0, 0, np.zeros((2, N), np.float32)), "shape \\(2, 60\\).* 4 query heads"),
        (lambda c: c.set_mass(0, 0, np.zeros(4 * N, np.float32)), "shape \\(240,\\)"),
        (lambda c: c.set_mass(0, 0, np.zeros((4, N - 1), np.float32)), "room for 59"),
        (lambda c: c.set_mu(0, 0, np.zeros((1, 64))), "shape \\(1, 64\\)"),
        (lambda c: c.set_mu(0, 0, np.full((2, 64), np.nan)), "no numbers"),
        (lambda c: c.keys_values(0, 0, 2), "KV head 2 is not below 2"),
        (lambda c: c.keys_values(0, 0, -1), "KV head -1 is not below 2"),
        (lambda c: c.rotate(0, np.zeros((2, 5)), np.arange(2)), "do not fit"),
        (lambda c: c.lengths(0, 2), "Layer 2 is not below 2"),
        (lambda c: c.lengths(0, -1), "Layer -1 is not below 2"),
        (lambda c: c.keep(0, 7, [np.arange(4)] * 2), "Layer 7 is not below 2"),
        (lambda c: c.lengths(2, 0), "Sequence 2 is not below n_seq_max = 2"),
        (lambda c: c.branch(0, 2), "Sequence 2 is not below n_seq_max = 2"),
        (lambda c: c.window_scores(0, 0, -1), "no -1 queries"),
    ],
)
def test_arguments_that_do_not_fit(call: Callable[[PagedCache], object], what: str, context: Context) -> None:
    before = context.save(0)
    with pytest.raises(KVError, match=what):
        call(paged(context))
    assert context.save(0) == before


def test_every_refusal_of_the_library_has_a_sentence_of_its_own(context: Context) -> None:
    """With NULL for what must be given, and numbers out of range: never a sentence of another call."""
    lib, native, ctx = library.load().lib, library.load(), context.handle
    ints, floats = (ctypes.c_int32 * 256)(), (ctypes.c_float * 256)()
    calls = {
        "kvl_has_kernels": (None,),
        "kvl_model_check": (None,),
        "kvl_format_check": (context.model.handle, 99),
        "kvl_get_layer": (ctx, 0, None),
        "kvl_get_stats": (ctx, None, 9, ctypes.byref(KvlSeqStats()), None, None),
        "kvl_slots": (ctx, 0, 0, ints, N, ints, None, None),
        "kvl_slot_mass": (ctx, 0, 0, None, 0, False),
        "kvl_read_kv": (ctx, 0, 0, 2, None, None),
        "kvl_demote": (ctx, 0, 0, 1, None, None, -1, 0),
        "kvl_set_mean": (ctx, 9, 0, None, 0, 0, 0),
        "kvl_window_scores": (ctx, 0, 0, 0, 0, None, 0),
        "kvl_set_mass": (ctx, 9),
        "kvl_value_norms": (ctx, 0, 0, None),
        "kvl_read_queries": (ctx, 0, 0, -1, floats),
        "kvl_rotate": (ctx, 0, -1, floats, ints),
        "kvl_keep": (ctx, 0, 0, None, None),
        "kvl_select": (ctx, 0, 0, ints, None),
        "kvl_branch": (ctx, 0, 7),
        "kvl_truncate": (ctx, 7, 0),
        "kvl_roll": (None, 0),
        "kvl_decode": (ctx, native.llama.llama_batch()),
    }
    for name, arguments in calls.items():
        lib.kvl_truncate(ctx, 99, 0)
        older = native.last_error()
        assert getattr(lib, name)(*arguments) < 0, name
        assert native.last_error() not in ("", older), name


def refused_batch(context: Context, **change: Any) -> str:
    """The sentence for a batch of four tokens behind sequence 0, with arrays or, if they end in _, pointers changed."""
    lib, batch = library.load().lib, context._batch
    context._tokens[:4], context._pos[:4], context._seq[:4] = [5, 6, 7, 8], range(N, N + 4), 0
    batch.n_tokens = 4
    for name, value in change.items():
        if name.endswith("_"):
            setattr(batch, name[:-1], value)
        else:
            getattr(context, f"_{name}")[:4] = value
    lib.kvl_truncate(context.handle, 99, 0)
    older = library.load().last_error()
    assert lib.kvl_decode(context.handle, batch) == library.ERR_ARGUMENT
    assert context.n_seen(0) == N
    said = library.load().last_error()
    assert said not in ("", older)
    return said


def test_batches_without_positions_or_sequences(context: Context) -> None:
    for name in ("token", "pos", "n_seq_id", "seq_id"):
        whole = getattr(context._batch, name)
        kind = dict(context._llama.llama_batch._fields_)[name]
        assert "with their positions and sequences" in refused_batch(context, **{name + "_": kind()})
        setattr(context._batch, name, whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": [5, 6, -1, 8]}, "token -1 is not one of the model's 320"),
        ({"tokens": [5, 6, 320, 8]}, "token 320 is not one of the model's 320"),
        ({"pos": [60, 61, 61, 62]}, "position 61 does not continue sequence 0, whose next one is 62"),
        ({"pos": [60, 61, 63, 64]}, "position 63 does not continue"),
        ({"pos": [59, 60, 61, 62]}, "position 59 does not continue sequence 0, whose next one is 60"),
        ({"pos": [61, 62, 63, 64]}, "position 61 does not continue"),
        ({"pos": [-1, 0, 1, 2], "seq": 1}, "position -1 .* negative"),
        ({"pos": [2**31 - 1] * 4, "seq": 1}, "position 2147483647 of sequence 1 is not below"),
        ({"pos": list(range(2**30 - 3, 2**30 + 1)), "seq": 1}, "of sequence 1 is not below"),
        ({"seq": [0, 0, 2, 0]}, "below n_seq_max = 2"),
        ({"seq": [0, 0, -1, 0]}, "below n_seq_max = 2"),
    ],
)
def test_batches_that_do_not_continue_their_sequences(change: dict[str, Any], what: str, context: Context) -> None:
    assert re.search(what, refused_batch(context, **change))
    assert context.n_seen(1) == 0
    context.decode([5], N, 0)


def test_the_same_batches_through_llama_decode(context: Context) -> None:
    """Upstream's own entry checks less: a position twice would be taken, and the saved sequence refused."""
    for pos, seq in (([60, 61, 61, 62], 0), ([2**31 - 1] * 4, 1), ([2**31 - 2, 2**31 - 1, 2**31 - 1, 2**31 - 1], 1)):
        context._tokens[:4], context._pos[:4], context._seq[:4] = 5, pos, seq
        context._batch.n_tokens = 4
        assert context._llama.llama_decode(context.handle, context._batch) < 0
        assert (context.n_seen(0), context.n_seen(1)) == (N, 0)
    context.restore(1, context.save(0))


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"n_seq_max": 257}, "257 sequences .* 256"),
        ({"n_seq_max": 0}, "n_seq_max is 0"),
        ({"n_seq_max": 2**32 + 1}, "n_seq_max is 4294967297"),
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"n_ctx": 2**32 + 256}, "n_ctx is 4294967552"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"n_ubatch": -5}, "n_ubatch is -5"),
    ],
)
def test_sizes_that_no_context_has(
    config: dict[str, int], what: str, paged: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    with pytest.raises(UsageError, match=what):
        open_context(open_model("llama"), paged=paged, **config)
