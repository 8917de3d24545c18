"""Eviction: what stays is what was asked for, and it contributes exactly what it did before."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from dense_llama import DenseLlama
from devices import chosen, within
from skips import TAKEN_WHOLE

from kvlocal.native.context import Context

SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "head_dim": 64}


def keep_random(context: Context, seq: int, seed: int, share: float = 0.3) -> list[list[np.ndarray]]:
    """Evict a random, ragged set; returns the positions that must be left, per layer and head."""
    assert context.cache is not None
    rng = np.random.default_rng(seed)
    left = []
    for layer in range(len(context.cache.layers)):
        positions = context.cache.positions(seq, layer)
        counts = [rng.integers(1, max(2, int(2 * share * len(p)))) for p in positions]
        slots = [np.sort(rng.choice(len(p), c, replace=False)) for p, c in zip(positions, counts, strict=True)]
        context.cache.keep(seq, layer, slots)
        left.append([p[s] for p, s in zip(positions, slots, strict=True)])
    return left


def assert_holds(context: Context, seq: int, left: list[list[np.ndarray]]) -> None:
    assert context.cache is not None
    for layer, heads in enumerate(left):
        for got, want in zip(context.cache.positions(seq, layer), heads, strict=True):
            np.testing.assert_array_equal(got, want)


def test_evicting_everywhere_equals_removing_from_the_stock_cache(
    open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 200)
    ours = open_context(model)
    stock = open_context(model, paged=False, type_kv="f32", flash_attn=False)
    for context in (ours, stock):
        context.decode(tokens[:160], 0, 0)
    assert ours.cache is not None
    kept = np.r_[0:20, 90:160]
    for layer in range(2):
        ours.cache.keep(0, layer, [kept, kept])
    assert stock._llama.llama_memory_seq_rm(stock._memory, 0, 20, 90)
    for i in range(160, 200):
        for context in (ours, stock):
            context.decode(tokens[i : i + 1], i, 0)
        a, b = ours.logits()[0], stock.logits()[0]
        assert np.abs(a - b).max() <= within(2e-3) * (b.max() - b.min())


@pytest.mark.parametrize("seed", range(3))
def test_ragged_heads_equal_a_dense_reference_over_the_kept_set(
    seed: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 151, seed)
    context = open_context(model)
    cache = context.cache
    assert cache is not None
    context.decode(tokens[:150], 0, 0)
    before = {(la, h): cache.keys_values(0, la, h) for la in range(2) for h in range(2)}
    left = keep_random(context, 0, seed)
    assert_holds(context, 0, left)
    for (layer, head), (k, v) in before.items():
        got_k, got_v = cache.keys_values(0, layer, head)
        np.testing.assert_array_equal(got_k, k[left[layer][head]])
        np.testing.assert_array_equal(got_v, v[left[layer][head]])

    dense = DenseLlama(model.path, **SHAPE)
    want = dense.step(int(tokens[150]), 150, lambda la, h: tuple(x[left[la][h]] for x in before[la, h]))
    context.decode(tokens[150:], 150, 0)
    assert np.abs(context.logits()[0] - want).max() <= within(2e-3) * (want.max() - want.min())


def test_many_tokens_after_a_ragged_eviction_equal_one_by_one(open_model: OpenModel, open_context: OpenContext) -> None:
    """The mask of a batch over ragged heads: order among the new tokens, padding never seen."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 170)
    results = []
    for split in (40, 1):
        context = open_context(model, n_outputs=64)
        context.decode(tokens[:130], 0, 0)
        keep_random(context, 0, seed=5)
        rows = []
        for i in range(130, 170, split):
            context.decode(tokens[i : i + split], i, 0, outputs="all")
            rows.append(context.logits(split))
        results.append(np.concatenate(rows))
    assert np.abs(results[0] - results[1]).max() <= within(1e-3) * np.ptp(results[1])


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("portable", [False, True])
def test_window_scores_equal_numpy(portable: bool, rms: bool, open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", n_layer=2, n_head=6, n_head_kv=2, head_dim=64)
    context = open_context(model, n_window=16, portable=portable)
    cache = context.cache
    assert cache is not None
    context.decode(random_tokens(model, 140), 0, 0)
    for evicted in (False, True):
        if evicted:
            for layer in range(2):  # ragged, and the window stays
                cache.keep(0, layer, [np.r_[3:40, 124:140], np.r_[0:90, 124:140]])
        for layer in range(2):
            got = cache.window_scores(0, layer, rms=rms)
            q = cache.queries(0, layer, 16).astype(np.float64)
            assert q.shape == (16, 6, 64)
            for head in range(6):
                k, _ = cache.keys_values(0, layer, head // 3)
                pos = cache.positions(0, layer)[head // 3]
                z = q[:, head] @ k.T / 8.0
                z[pos[None] > np.arange(124, 140)[:, None]] = -np.inf
                a = np.exp(z - z.max(1, keepdims=True))
                p = a / a.sum(1, keepdims=True)
                want = np.sqrt((p**2).mean(0)) if rms else p.mean(0)
                np.testing.assert_allclose(got[head, : len(pos)], want, rtol=1e-3, atol=1e-6)
                assert not got[head, len(pos) :].any()


def test_the_window_follows_the_last_tokens(open_model: OpenModel, open_context: OpenContext) -> None:
    """However the tokens came in, the ring holds the queries of the last ones; a cut tail leaves fewer."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 100)
    whole, pieces = open_context(model, n_window=24), open_context(model, n_window=24, n_ubatch=16)
    whole.decode(tokens, 0, 0)
    for i in range(0, 100, 7):
        pieces.decode(tokens[i : i + 7], i, 0)
    assert whole.cache is not None and pieces.cache is not None
    a, b = whole.cache.queries(0, 1, 24), pieces.cache.queries(0, 1, 24)
    np.testing.assert_allclose(a, b, atol=within(2e-3))
    pieces.truncate(0, 90)
    np.testing.assert_array_equal(pieces.cache.queries(0, 1, 24), b[:14])


def test_evicting_a_branch_leaves_its_source_alone(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 131)
    context = open_context(model, n_seq_max=3)
    cache = context.cache
    assert cache is not None
    context.decode(tokens[:130], 0, 0)
    everything = [cache.positions(0, la) for la in range(2)]
    stored = cache.keys_values(0, 1, 1)
    context.branch(0, 1)
    left = keep_random(context, 1, seed=3)
    context.branch(1, 2)
    left_again = keep_random(context, 2, seed=4)
    assert_holds(context, 0, everything)
    assert_holds(context, 1, left)
    assert_holds(context, 2, left_again)
    for got, want in zip(cache.keys_values(0, 1, 1), stored, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(cache.keys_values(1, 1, 1), stored, strict=True):
        np.testing.assert_array_equal(got, want[left[1][1]])
    for seq in range(3):
        context.truncate(seq, 0)
    assert context.stats().used_bytes == context.stats().allocated_bytes == 0


def test_positions_are_the_true_ones(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model)
    assert context.cache is not None
    context.decode(random_tokens(model, 100), 0, 0)
    left = keep_random(context, 0, seed=1)
    assert context.n_seen(0) == 100
    context.decode(random_tokens(model, 5), 100, 0)
    assert_holds(context, 0, [[np.r_[p, 100:105] for p in heads] for heads in left])


def test_resident_memory_falls(open_model: OpenModel, open_context: OpenContext) -> None:
    """Freed pages go back to the operating system, also where a page of ours is no multiple of one of its."""
    from kvlocal.engine.report import rss_bytes

    if not chosen.is_cpu:
        pytest.skip(TAKEN_WHOLE)
    for head_dim in (64, 80):
        model = open_model("llama", n_layer=4, n_head=8, n_head_kv=8, head_dim=head_dim)
        context = open_context(model, n_ctx=8192, n_window=0)
        cache = context.cache
        assert cache is not None
        context.decode(random_tokens(model, 2000), 0, 0)
        context.decode(random_tokens(model, 2000), 2000, 0)
        rss, used = rss_bytes(), context.stats().used_bytes
        kept = np.arange(0, 4000, 8)
        for layer in range(4):
            cache.keep(0, layer, [kept] * 8)
        evicted = used - context.stats().used_bytes
        assert evicted == used * 7 // 8
        assert rss - rss_bytes() >= 0.8 * evicted
