"""A decode of more tokens than a batch holds is computed in parts: the same logits, or nothing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import within

from kvlocal.errors import KVError

N = 150


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("n_batch", [32, 75, 149, 150])
def test_all_outputs(n_batch: int, paged: bool, open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    tokens = random_tokens(model, N)
    logits = []
    for size in (512, n_batch):
        context = open_context(model, paged=paged, n_batch=size, n_ubatch=32, n_outputs=N)
        context.decode(tokens, 0, outputs="all")
        assert context.n_seen(0) == N
        logits.append(context.logits(N))
    np.testing.assert_allclose(logits[1], logits[0], atol=within(2e-3) * np.abs(logits[0]).max())


@pytest.mark.parametrize("n_batch", [16, 40, 90])
def test_the_last_output_of_every_sequence(n_batch: int, open_model: OpenModel, open_context: OpenContext) -> None:
    """Sequence 0 ends in the middle of what is given, sequence 1 at its end."""
    model = open_model("llama")
    tokens = random_tokens(model, N)
    pos, seq = np.r_[0:50, 0:100], np.repeat([0, 1], [50, 100])
    logits = []
    for size in (512, n_batch):
        context = open_context(model, n_seq_max=2, n_batch=size)
        context.decode(tokens, pos, seq)
        logits.append(context.logits(2))
    np.testing.assert_allclose(logits[1], logits[0], atol=within(2e-3) * np.abs(logits[0]).max())
    assert np.abs(logits[0][0] - logits[0][1]).max() > 1


def test_logits_are_those_of_the_last_decode(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context, other = (open_context(model, n_batch=size) for size in (64, 512))
    tokens = random_tokens(model, N)
    for one in (context, other):
        one.decode(tokens[:-1], 0)
        one.decode(tokens[-1:], N - 1)
    np.testing.assert_allclose(context.logits(), other.logits(), atol=within(2e-3) * np.abs(other.logits()).max())


@pytest.mark.parametrize("paged", [True, False])
def test_what_has_no_room_leaves_nothing_behind(paged: bool, open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama")
    context = open_context(model, paged=paged, n_ctx=256, n_batch=64)
    tokens = random_tokens(model, 400)
    context.decode(tokens[:100], 0)
    with pytest.raises(KVError, match="full"):
        context.decode(tokens[100:], 100)
    assert context.n_seen(0) == 100
    context.decode(tokens[100:256], 100)


@pytest.mark.parametrize("paged", [True, False])
def test_buffers_are_for_no_more_than_the_context_holds(
    paged: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama")
    tracemalloc.start()
    try:
        context = open_context(model, paged=paged, n_ctx=256, n_batch=2**22, n_ubatch=2**22)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    context.decode(random_tokens(model, 200), 0)
    assert context.n_seen(0) == 200
