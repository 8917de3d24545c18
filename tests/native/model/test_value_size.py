"""Models whose values are of another size than their keys, whole: computed, evicted, demoted, saved."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import within

from kvlocal.native.context import Context

SIZES = [(64, 32), (64, 96), (128, 64), (32, 40)]
N = 200


def decoded(context: Context, tokens: np.ndarray) -> np.ndarray:
    context.decode(tokens[:-8], 0)
    rows = []
    for at in range(len(tokens) - 8, len(tokens)):
        context.decode(tokens[at : at + 1], at)
        rows.append(context.logits()[0])
    return np.array(rows)


@pytest.mark.parametrize("portable", [False, True], ids=["kernel", "portable"])
@pytest.mark.parametrize(("d_k", "d_v"), SIZES)
def test_the_paged_cache_computes_what_the_stock_cache_computes(
    d_k: int, d_v: int, portable: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("plm", n_head=4, n_head_kv=4, head_dim=d_k, head_dim_v=d_v)
    tokens = random_tokens(model, N)
    context = open_context(model, portable=portable, n_ubatch=64)
    assert context.cache is not None
    assert {(layer.d_k, layer.d_v) for layer in context.cache.layers} == {(d_k, d_v)}
    stock = decoded(open_context(model, paged=False, type_kv="f32", flash_attn=False), tokens)
    ours = decoded(context, tokens)
    assert np.abs(ours - stock).max() <= within(2e-3) * (stock.max() - stock.min())
    assert context.stats().used_bytes == N * 2 * 4 * (d_k + d_v) * 2


@pytest.mark.parametrize(("d_k", "d_v"), [(128, 64), (64, 128)])
@pytest.mark.parametrize("storage", ["q8", "kv2", "kivi"])
def test_evicted_demoted_saved_and_restored(
    storage: str, d_k: int, d_v: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("plm", n_head=4, n_head_kv=4, head_dim=d_k, head_dim_v=d_v)
    config = {"formats": (storage,), "rotate": storage != "kivi", "mass": "sum"}
    context, other = (open_context(model, **config) for _ in range(2))
    cache, tokens = context.cache, random_tokens(model, N)
    assert cache is not None
    context.decode(tokens, 0)
    before = [cache.keys_values(0, layer, 1) for layer in range(2)]
    for layer in range(2):
        assert cache.window_scores(0, layer).shape == (4, N)
        assert [len(norms) for norms in cache.value_norms(0, layer)] == [N] * 4
        cache.keep(0, layer, [np.arange(0, N, 2), np.arange(N // 4, N)] * 2)
        assert cache.centre(0, layer, 0, N)
        cache.demote(0, layer, [np.arange(64)] * 4, storage)
        for now, then in zip(cache.keys_values(0, layer, 1), before[layer], strict=True):
            then = then[N // 4 :]
            assert now.shape == then.shape
            np.testing.assert_allclose(now[64:], then[64:], atol=1e-2)
            assert np.corrcoef(now[:64].ravel(), then[:64].ravel())[0, 1] > 0.9
    other.restore(0, context.save(0))
    for one in (context, other):
        one.decode([5, 6, 7], N)
    np.testing.assert_array_equal(context.logits(), other.logits())
    assert np.isfinite(context.logits()).all()


def test_a_renumbered_sequence_goes_on_as_if_it_were_only_as_long_as_what_is_left(
    open_model: OpenModel, open_context: OpenContext
) -> None:
    """Only the end of these keys is turned, where other models turn the beginning."""
    model = open_model("plm", n_head=4, n_head_kv=4, head_dim=64, head_dim_v=32)
    context = open_context(model, n_seq_max=2)
    cache, tokens = context.cache, random_tokens(model, 131)
    assert cache is not None
    context.decode(tokens[:130], 0, 0)
    for layer in range(2):
        cache.keep(0, layer, [np.arange(50, 130)] * 4)
    context.branch(0, 1)
    cache.roll(1)
    context.decode(tokens[130:], 130, 0)
    true = context.logits()[0]
    context.decode(tokens[130:], 80, 1)
    np.testing.assert_allclose(context.logits()[0], true, atol=within(2e-3) * np.abs(true).max())
