"""The native code refuses with a reason and changes nothing; it never ends the process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import tinygguf
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.errors import KVError, UsageError
from kvlocal.native import library
from kvlocal.native.model import Model


@pytest.mark.parametrize("arch", tinygguf.refused_archs())
def test_unsupported_architectures_are_named(arch: str, tmp_path: Path, open_context: OpenContext) -> None:
    tinygguf.write_model(tmp_path / "m.gguf", arch)
    model = Model(tmp_path / "m.gguf")
    try:
        with pytest.raises(UsageError, match=f"'{arch}'.*--policy full"):
            model.check_paged()
        with pytest.raises(UsageError, match=f"'{arch}'"):
            open_context(model)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("slots", "what"),
    [
        ([[0, 1], [5, 5]], "ascending"),
        ([[0, 1], [7, 3]], "ascending"),
        ([[0, 50], [0]], "below 50, got 50"),
        ([[-1], [0]], "below 50, got -1"),
        ([[], [0]], "at least one"),
    ],
)
def test_bad_slots_change_nothing(
    slots: list[list[int]], what: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama")
    context = open_context(model)
    cache = context.cache
    assert cache is not None
    context.decode(random_tokens(model, 50), 0, 0)
    with pytest.raises(KVError, match=what):
        cache.keep(0, 0, [np.array(s, np.int32) for s in slots])
    np.testing.assert_array_equal(cache.lengths(0, 0), [50, 50])


def test_indices_out_of_range(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama"))
    cache = context.cache
    assert cache is not None
    with pytest.raises(KVError, match="Sequence 3 is not below n_seq_max = 1"):
        cache.seq_stats(3)
    with pytest.raises(KVError, match="Layer 9 is not below 2"):
        cache._check(cache._lib.kvl_slots(cache._ctx, 0, 9, (ctypes.c_int32 * 2)(), 0, None, None, None))
    with pytest.raises(KVError, match="No window queries"):
        cache._check(cache._lib.kvl_window_scores(cache._ctx, 0, 0, 0, 0, (ctypes.c_float * 4)(), 1))


def test_a_full_pool_is_an_error_and_loses_nothing(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context = open_context(model, n_ctx=256)
    tokens = random_tokens(model, 400)
    context.decode(tokens[:250], 0, 0)
    with pytest.raises(KVError, match="pool is full: the batch needs .* pages, .* are free"):
        context.decode(tokens[250:400], 250, 0)
    assert context.n_seen(0) == 250
    context.decode(tokens[250:256], 250, 0)


def test_evicting_a_branch_needs_room_for_its_own_pages(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context = open_context(model, n_ctx=256, n_seq_max=3)
    cache = context.cache
    assert cache is not None
    context.decode(random_tokens(model, 64), 0, 0)
    context.branch(0, 1)
    n = 0
    while context.stats().allocated_bytes < context.stats().reserved_bytes:
        context.decode(random_tokens(model, 32), n, 2)
        n += 32
    with pytest.raises(KVError, match="No room to separate a shared branch"):
        cache.keep(1, 0, [np.arange(1, 64)] * 2)
    np.testing.assert_array_equal(cache.lengths(1, 0), [64, 64])
    context.truncate(0, 0)
    cache.keep(1, 0, [np.arange(1, 64)] * 2)


def test_too_many_outputs_or_tokens(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context = open_context(model, n_batch=64)
    with pytest.raises(KVError, match="asks for 20 outputs, the context has room for 1"):
        context.decode(random_tokens(model, 20), 0, 0, outputs="all")
    context._batch.n_tokens = 65
    assert context._native.lib.kvl_decode(context.handle, context._batch) == library.ERR_ARGUMENT
    assert "exceeds n_batch = 64" in context._native.last_error()


def test_operations_without_meaning_on_a_paged_cache(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context = open_context(model, n_seq_max=2)
    llama, memory = context._llama, context._memory
    context.decode(random_tokens(model, 60), 0, 0)
    assert not llama.llama_memory_seq_rm(memory, 0, 10, 20), "a hole is made with keep, not with seq_rm"
    assert "removes only the tail" in context._native.last_error()
    assert not llama.llama_memory_can_shift(memory)
    llama.llama_memory_seq_add(memory, 0, 0, -1, 5)
    assert "cannot shift" in context._native.last_error()
    llama.llama_memory_seq_cp(memory, 0, 1, 5, -1)
    assert "from its beginning" in context._native.last_error()
    assert llama.llama_state_get_size(context.handle) == 0
    assert context.n_seen(0) == 60 and context.n_seen(1) == 0
    llama.llama_memory_seq_cp(memory, 0, 1, 0, 40)
    assert context.n_seen(1) == 40
    llama.llama_memory_clear(memory, True)
    assert context.stats().allocated_bytes == 0


def test_a_stock_context_is_told_apart(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama"), paged=False)
    lib = context._native.lib
    assert not lib.kvl_is_paged(context.handle)
    assert lib.kvl_n_layer(context.handle) == library.ERR_ARGUMENT
    assert "no paged memory" in context._native.last_error()
    assert lib.kvl_n_layer(None) == library.ERR_ARGUMENT
    assert lib.kvl_model_check(None) == library.ERR_ARGUMENT


def test_truncated_and_foreign_files(tmp_path: Path, model_dir: Path, open_model: OpenModel) -> None:
    whole = open_model("llama").path.read_bytes()
    for n in (5, 100, 5000, len(whole) - 1000):
        path = tmp_path / f"{n}.gguf"
        path.write_bytes(whole[:n])
        with pytest.raises(KVError, match="cannot be loaded as a GGUF model"):
            Model(path)
