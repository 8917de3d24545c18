"""The page kernels against the portable path, over shapes; the portable path against stock is in test_against_stock."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.native.context import Context


def keep_ragged(context: Context, seq: int) -> None:
    """Different numbers of slots in every head, the same in every context."""
    assert context.cache is not None
    rng = np.random.default_rng(7)
    for layer in range(len(context.cache.layers)):
        slots = []
        for n in context.cache.lengths(seq, layer):
            slots.append(np.sort(rng.choice(n, rng.integers(1, n), replace=False)))
        context.cache.keep(seq, layer, slots)


def both(open_context: OpenContext, open_model: OpenModel, shape: dict[str, int], **config: int) -> list[Context]:
    model = open_model("llama", n_layer=2, n_ff=32, **shape)
    return [
        open_context(model, n_outputs=1024, n_batch=1024, n_ubatch=1024, portable=p, **config) for p in (True, False)
    ]


def assert_close(contexts: list[Context], n: int) -> None:
    want, got = (context.logits(n) for context in contexts)
    assert np.abs(got - want).max() <= 2e-4 * np.ptp(want), "f32 sums in another order, nothing else"


@pytest.mark.parametrize("n_query", [1, 2, 7, 24, 25, 33, 600])
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(2, 2), (3, 1), (8, 2), (5, 1), (16, 1)])
def test_queries_and_groups(
    n_query: int, n_head: int, n_head_kv: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """From one query to many: both kernels and the border between them, before and after a ragged eviction."""
    contexts = both(open_context, open_model, {"n_head": n_head, "n_head_kv": n_head_kv, "head_dim": 64}, n_ctx=2048)
    model = contexts[0].model
    for evicted in (False, True):
        for context in contexts:
            context.truncate(0, 0)
            context.decode(random_tokens(model, 333), 0, 0)
            if evicted:
                keep_ragged(context, 0)
            context.decode(random_tokens(model, n_query, seed=1), 333, 0, outputs="all")
        assert_close(contexts, n_query)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 72])
@pytest.mark.parametrize("n_query", [1, 100])
def test_head_sizes(head_dim: int, n_query: int, open_model: OpenModel, open_context: OpenContext) -> None:
    contexts = both(open_context, open_model, {"n_head": 4, "n_head_kv": 2, "head_dim": head_dim})
    for context in contexts:
        context.decode(random_tokens(context.model, 201), 0, 0)
        keep_ragged(context, 0)
        context.decode(random_tokens(context.model, n_query, seed=1), 201, 0, outputs="all")
    assert_close(contexts, n_query)


@pytest.mark.parametrize("n_query", [1, 3, 40])
def test_several_sequences(n_query: int, open_model: OpenModel, open_context: OpenContext) -> None:
    """Three sequences of different lengths in one batch, one of them evicted."""
    contexts = both(open_context, open_model, {"n_head": 6, "n_head_kv": 2, "head_dim": 64}, n_seq_max=3)
    lengths = [30, 200, 65]
    for context in contexts:
        for seq, n in enumerate(lengths):
            context.decode(random_tokens(context.model, n, seed=seq), 0, seq)
        keep_ragged(context, 1)
        tokens = random_tokens(context.model, 3 * n_query, seed=9)
        pos = np.concatenate([np.arange(n, n + n_query) for n in lengths])
        context.decode(tokens, pos, np.repeat([0, 1, 2], n_query), outputs="all")
    assert_close(contexts, 3 * n_query)


def test_the_number_of_threads_changes_nothing(open_model: OpenModel, open_context: OpenContext) -> None:
    """Work is cut into parts that do not depend on the threads: equal to the bit."""
    model = open_model("llama", n_layer=2, n_head=6, n_head_kv=2, head_dim=64)
    rows = []
    for n_threads in (1, 2, 3):
        context = open_context(model, n_threads=n_threads, n_ctx=2048, n_batch=1024)
        context.decode(random_tokens(model, 700), 0, 0)
        context.decode([5], 700, 0)
        rows.append(context.logits()[0])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
