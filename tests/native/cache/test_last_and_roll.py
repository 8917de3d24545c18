"""The last query that found a slot important, rotations outside the graph, and renumbered sequences."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import within

from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
GROUP = 3


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def probabilities(cache: PagedCache, layer: int, n: int) -> np.ndarray:
    """Of every query for every slot, f64 ``[n_head, n, n]``."""
    q = cache.queries(0, layer, n).astype(np.float64)
    out = []
    for h in range(SHAPE["n_head"]):
        k = cache.keys_values(0, layer, h // GROUP)[0].astype(np.float64)
        z = q[:, h] @ k.T * SHAPE["head_dim"] ** -0.5
        z[np.triu_indices(n, 1)] = -np.inf
        p = np.exp(z - z.max(1, keepdims=True))
        out.append(p / p.sum(1, keepdims=True))
    return np.array(out)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("n_ubatch", [1, 7, 300])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_last_query_that_gave_a_slot_its_share_is_noted(
    n_ubatch: int, n_threads: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Single tokens, few and many queries per step: the same numbers, wherever the share is not a close call."""
    model = open_model("llama", **SHAPE)
    n = 250
    context = open_context(model, n_window=n, n_ubatch=n_ubatch, n_threads=n_threads)
    cache = paged(context)
    cache.accumulate_mass("last")
    context.decode(random_tokens(model, n), 0, 0)
    number = np.arange(1, n + 1)
    for layer in range(2):
        p = probabilities(cache, layer, n)
        share = p * number[None, :, None]  # of the mean: 1 is the threshold
        low, high = (
            np.where(share >= threshold, number[None, :, None], 0).max(1) for threshold in (1.0 + 1e-4, 1.0 - 1e-4)
        )
        last = cache.mass(0, layer)
        assert (last >= low).all() and (last <= high).all()
        assert (low == high).mean() > 0.95 and len(np.unique(last)) > 20


@pytest.mark.needs_kernels
def test_important_is_relative_to_what_a_query_sees(open_model: OpenModel, open_context: OpenContext) -> None:
    """With half of the slots hidden, those that remain share the attention and the mean is twice as high."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=1)
    cache = paged(context)
    cache.accumulate_mass("last")
    tokens = random_tokens(model, 101)
    context.decode(tokens[:100], 0, 0)
    seen = np.arange(0, 100, 2)
    for layer in range(2):
        cache.set_mass(0, layer, np.zeros((6, 100)))
        cache.select(0, layer, [seen, seen])
    context.decode(tokens[100:], 100, 0)
    last = cache.mass(0, 0)
    q = cache.queries(0, 0, 1)[0].astype(np.float64)
    for h in range(SHAPE["n_head"]):
        k = cache.keys_values(0, 0, h // GROUP)[0].astype(np.float64)[np.r_[seen, 100]]
        z = k @ q[h] * SHAPE["head_dim"] ** -0.5
        share = np.exp(z - z.max())
        share *= len(z) / share.sum()
        sure = np.abs(share - 1) > 1e-4
        np.testing.assert_array_equal(last[h, np.r_[seen, 100]][sure], np.where(share >= 1, 101, 0)[sure])
        assert not last[h, 1:100:2].any()


def first_keys(context: Context) -> np.ndarray:
    """Keys of layer 0, KV head 1, ``[n, d]``: they depend on their own token and position alone."""
    return paged(context).keys_values(0, 0, 1)[0]


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_rotation_takes_keys_to_other_positions_and_back(
    arch: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model(arch, **SHAPE)
    context = open_context(model)
    context.decode([7] * 40, 0, 0)
    keys = first_keys(context)
    turned = paged(context).rotate(0, keys, -np.arange(40))
    np.testing.assert_allclose(turned, np.broadcast_to(keys[0], keys.shape), atol=within(4e-3) * np.abs(keys).max())
    back = paged(context).rotate(0, turned, np.arange(40))
    np.testing.assert_allclose(back, keys, atol=1e-5 * np.abs(keys).max())


def test_a_rolled_sequence_goes_on_as_if_it_were_only_as_long_as_what_is_left(
    open_model: OpenModel, open_context: OpenContext
) -> None:
    """Dropping the beginning and renumbering moves everything by the same distance: rotations are relative."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_seq_max=2)
    cache = paged(context)
    tokens = random_tokens(model, 131)
    context.decode(tokens[:130], 0, 0)
    for layer in range(2):
        cache.keep(0, layer, [np.arange(50, 130)] * 2)
    context.branch(0, 1)
    cache.roll(1)
    assert context.n_seen(1) == 80 and context.n_seen(0) == 130
    for layer in range(2):
        assert all(np.array_equal(p, np.arange(80)) for p in cache.positions(1, layer))
        assert all(np.array_equal(p, np.arange(50, 130)) for p in cache.positions(0, layer)), "the other one changed"
    context.decode(tokens[130:], 130, 0)
    true = context.logits()[0]
    context.decode(tokens[130:], 80, 1)
    np.testing.assert_allclose(context.logits()[0], true, atol=within(2e-3) * np.abs(true).max())
    assert cache.stats().used_bytes == cache.bytes_per_token * (81 + 81)


def test_slots_that_stay_in_place_keep_their_keys(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model)
    cache = paged(context)
    context.decode([7] * 100, 0, 0)
    before = first_keys(context)
    keep = [np.r_[0:10, 60:100], np.r_[0:10, 20:30, 70:100]]
    for layer in range(2):
        cache.keep(0, layer, keep)
    cache.roll(0)
    after = first_keys(context)
    np.testing.assert_array_equal(after[:10], before[:10])
    np.testing.assert_allclose(after, before[:50], atol=within(4e-3) * np.abs(before).max())
    with pytest.raises(KVError, match="No window queries"):
        cache.window_scores(0, 0)


def test_heads_of_different_lengths_cannot_be_renumbered(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model)
    cache = paged(context)
    context.decode(random_tokens(model, 20), 0, 0)
    cache.keep(0, 0, [np.arange(20), np.arange(1, 20)])
    with pytest.raises(KVError, match="20 and 19 slots"):
        cache.roll(0)
    assert context.n_seen(0) == 20 and cache.positions(0, 0)[1][0] == 1
