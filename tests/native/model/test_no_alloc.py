"""A model without weights: its contexts count what others hold, and refuse to be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import devices
import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from skips import TAKEN_WHOLE

from kvlocal.errors import KVError
from kvlocal.native.context import Context
from kvlocal.native.model import Model

COUNTED = ("used_bytes", "allocated_bytes", "peak_bytes", "full_bytes", "reserved_bytes", "table_bytes", "query_bytes")


@pytest.fixture
def pair(open_model: OpenModel) -> Iterator[tuple[Model, Model]]:
    """A model with weights and the same without."""
    model = open_model("llama", n_head=8, n_head_kv=2, head_dim=64)
    dry = Model(model.path, no_alloc=True)
    yield model, dry
    dry.close()


def counted(context: Context) -> dict[str, int]:
    stats = context.stats()
    return {name: getattr(stats, name) for name in COUNTED}


def evict_and_demote(context: Context, storage: str) -> None:
    """Ragged heads, pages of two formats, holes, and a tail that grows."""
    cache = context.cache
    assert cache is not None
    for layer in range(len(cache.layers)):
        cache.keep(0, layer, [np.arange(0, 200, 2 + head) for head in range(2)])
        assert cache.centre(0, layer, 0, 200, 1) > 0
        cache.demote(0, layer, [np.arange(10, 42), np.arange(64)], storage)


@pytest.mark.parametrize("storage", ["q8", "kv2", "kivi"])
def test_what_is_taken_without_weights_is_what_is_taken_with_them(
    pair: tuple[Model, Model], open_context: OpenContext, storage: str
) -> None:
    told = []
    for model in pair:
        context = open_context(model, n_seq_max=2, n_window=16, formats=(storage,), rotate=True, n_ubatch=64)
        tokens = random_tokens(model, 250)
        seen = []
        context.decode(tokens[:200], 0)
        context.decode(tokens[:50], 0, 1)
        seen.append(counted(context))
        evict_and_demote(context, storage)
        seen.append(counted(context))
        context.decode(tokens[200:], 200)
        context.branch(0, 1)
        context.decode(tokens[:40], 250, 1)
        seen.append(counted(context))
        context.truncate(1, 255)
        seen.append(counted(context))
        assert context.cache is not None
        seen.append([at.tolist() for layer in range(2) for at in context.cache.positions(1, layer)])
        told.append(seen)
    assert told[0] == told[1]


def test_the_cache_of_llama_cpp_counts_as_well(pair: tuple[Model, Model], open_context: OpenContext) -> None:
    told = []
    for model in pair:
        context = open_context(model, paged=False, n_ctx=512)
        context.decode(random_tokens(model, 300), 0)
        assert context.n_seen(0) == 300
        told.append(counted(context))
        with pytest.raises(KVError, match="context of 512 tokens is full"):
            context.decode(random_tokens(model, 300), 300)
    assert told[0] == told[1]


@pytest.mark.parametrize("paged", [True, False])
def test_buffers_are_as_large_as_they_would_be(
    pair: tuple[Model, Model], open_context: OpenContext, paged: bool
) -> None:
    """In main memory: buffers of an accelerator are not made, and so not counted, for a model without weights."""
    if not devices.chosen.is_cpu:
        pytest.skip(TAKEN_WHOLE)
    told: list[Any] = []
    for model in pair:
        context = open_context(model, paged=paged, n_ctx=2048)
        bytes_of = context.breakdown()
        told.append((bytes_of.compute_bytes, bytes_of.context_bytes))
        # a mapped file also has the gaps between its tensors
        assert bytes_of.model_bytes == pytest.approx(model.path.stat().st_size, rel=0.1)
        nothing = context.breakdown(on_device=True)
        assert (nothing.model_bytes, nothing.context_bytes, nothing.compute_bytes) == (0, 0, 0)
    assert told[0] == told[1]
    assert min(told[0]) > 0


def test_a_sequence_is_renumbered_without_keys(pair: tuple[Model, Model], open_context: OpenContext) -> None:
    told = []
    for model in pair:
        context = open_context(model)
        context.decode(random_tokens(model, 100), 0)
        cache = context.cache
        assert cache is not None
        for layer in range(len(cache.layers)):
            cache.keep(0, layer, [np.r_[0:4, 60:100]] * 2)
        cache.roll(0)
        told.append((context.n_seen(0), [at.tolist() for at in cache.positions(0, 1)], counted(context)))
    assert told[0] == told[1]
    assert told[0][0] == 44


def test_what_is_not_there_cannot_be_read(pair: tuple[Model, Model], open_context: OpenContext) -> None:
    context = open_context(pair[1], n_window=16)
    context.decode(random_tokens(pair[1], 64), 0)
    cache = context.cache
    assert cache is not None
    reads = [
        lambda: cache.window_scores(0, 0),
        lambda: cache.keys_values(0, 0, 0),
        lambda: cache.value_norms(0, 0),
        lambda: cache.queries(0, 0, 4),
        lambda: cache.rotate(0, np.zeros((2, 64), np.float32), np.arange(2)),
    ]
    for read in reads:
        with pytest.raises(KVError, match="loaded without its weights"):
            read()


def test_a_full_cache_is_full_without_weights_too(pair: tuple[Model, Model], open_context: OpenContext) -> None:
    context = open_context(pair[1], n_ctx=256)
    context.decode(random_tokens(pair[1], 256), 0)
    with pytest.raises(KVError, match="The KV pool is full"):
        context.decode(random_tokens(pair[1], 64), 256)
    assert context.n_seen(0) == 256
