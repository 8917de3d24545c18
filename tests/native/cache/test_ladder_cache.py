"""The ladder on the real cache: bytes, rungs that only fall, and what is read back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import Sequence
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.policies import make_policy

SHAPE = {"n_layer": 3, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
POLICY = make_policy("ladder")


def open_ladder(open_model: OpenModel, open_context: OpenContext, **config: Any) -> tuple[Context, PagedCache]:
    context = open_context(
        open_model("llama", **SHAPE),
        **({"formats": POLICY.formats, "rotate": True, "n_window": POLICY.n_window, "n_seq_max": 2} | config),
    )
    assert context.cache is not None
    return context, context.cache


def where(cache: PagedCache, seq: int) -> list[dict[int, tuple[int, np.ndarray, np.ndarray]]]:
    """Per layer and head: position to format, key and value."""
    out = []
    for layer in range(SHAPE["n_layer"]):
        heads = zip(cache.positions(seq, layer), cache.slot_formats(seq, layer), strict=True)
        for h, (positions, formats) in enumerate(heads):
            keys, values = cache.keys_values(seq, layer, h)
            rows = zip(positions.tolist(), formats.tolist(), keys, values, strict=True)
            out.append({p: (f, k, v) for p, f, k, v in rows})
    return out


@pytest.mark.parametrize("budget", [32, 100, 180])
def test_over_many_evictions_bytes_hold_rungs_fall_and_what_stays_does_not_drift(
    budget: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    context, cache = open_ladder(open_model, open_context)
    tokens = random_tokens(context.model, 700)
    context.decode(tokens[:380], 0, 0)
    most = budget * cache.bytes_per_token
    demoted = 0
    for n in range(380, 700, 32):
        before = where(cache, 0)
        assert evict(Sequence.adopt(context, 0), POLICY, budget)
        assert cache.seq_stats(0).page_bytes <= most
        assert cache.stats().allocated_bytes == cache.seq_stats(0).page_bytes
        for old, new in zip(before, where(cache, 0), strict=True):
            assert {*range(4), *range(n - 28, n)} <= new.keys() <= old.keys()
            for position, (rung, key, value) in new.items():
                was = old[position]
                assert rung >= was[0]
                demoted += rung > was[0]
                if rung == was[0]:
                    np.testing.assert_array_equal(key, was[1])
                    np.testing.assert_array_equal(value, was[2])
        context.decode(tokens[n : n + 32], n, 0)
    assert demoted > (1000 if budget > 32 else -1)  # 32 are the pages of what always stays


def test_a_sequence_within_its_bytes_is_left_alone(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_ladder(open_model, open_context)
    context.decode(random_tokens(context.model, 128), 0, 0)
    assert not evict(Sequence.adopt(context, 0), POLICY, 128)
    assert evict(Sequence.adopt(context, 0), POLICY, 127)
    assert not evict(Sequence.adopt(context, 0), POLICY, 127)
    assert cache.seq_stats(0).n_slots > 127 * 6


def test_a_branch_that_is_evicted_leaves_the_other_as_it_was(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_ladder(open_model, open_context)
    context.decode(random_tokens(context.model, 400), 0, 0)
    evict(Sequence.adopt(context, 0), POLICY, 200)
    context.branch(0, 1)
    before = where(cache, 0)
    evict(Sequence.adopt(context, 1), POLICY, 80)
    for old, new in zip(before, where(cache, 0), strict=True):
        assert old.keys() == new.keys()
        for position, (rung, key, value) in new.items():
            assert rung == old[position][0]
            np.testing.assert_array_equal(key, old[position][1])
            np.testing.assert_array_equal(value, old[position][2])


def test_without_formats_it_keeps_or_drops_pages(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_ladder(open_model, open_context, formats=(), rotate=False)
    context.decode(random_tokens(context.model, 400), 0, 0)
    evict(Sequence.adopt(context, 0), POLICY, 160)
    lengths = np.concatenate(cache.held(0))
    assert (lengths % 32 == 0).all() and lengths.sum() == 160 * 6
