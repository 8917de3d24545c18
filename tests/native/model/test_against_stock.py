"""Nothing evicted: the paged cache computes what the stock cache computes, on every architecture it serves."""

from __future__ import annotations

import numpy as np
import pytest
import tinygguf
from contexts import OpenContext, OpenModel, random_tokens
from devices import kl_within, within

from kvlocal.native.context import Context
from kvlocal.native.model import Model

N = 300


def run(context: Context, tokens: np.ndarray, *, split: int, seq: int = 0) -> np.ndarray:
    """Logits of all positions, the first tokens in batches of ``split`` and the last 12 one by one."""
    rows = []
    starts = [*range(0, len(tokens) - 12, split), *range(len(tokens) - 12, len(tokens))]
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        context.decode(tokens[begin:end], begin, seq, outputs="all")
        rows.append(context.logits(end - begin))
    return np.concatenate(rows)


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(-1)


def assert_equal_up_to_f16(ours: np.ndarray, stock: np.ndarray) -> None:
    """The bounds of design section 5: f16 rounding of K and V is the only difference."""
    spread = float(stock.max() - stock.min())
    assert np.abs(ours - stock).max() <= within(2e-3) * spread
    assert kl(stock, ours).max() < kl_within(1e-5)


def stock_logits(model: Model, tokens: np.ndarray, open_context: OpenContext) -> np.ndarray:
    context = open_context(model, paged=False, type_kv="f32", flash_attn=False, n_outputs=512)
    return run(context, tokens, split=512)


@pytest.mark.parametrize("portable", [False, True], ids=["kernel", "portable"])
@pytest.mark.parametrize("combo", tinygguf.default_grid(), ids=lambda c: c.id)
def test_every_architecture(
    combo: tinygguf.Combo, portable: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model(combo.arch, n_head=combo.n_head, n_head_kv=combo.n_head_kv, head_dim=combo.head_dim)
    tokens = random_tokens(model, N)
    ours = run(open_context(model, n_outputs=512, portable=portable), tokens, split=512)
    assert_equal_up_to_f16(ours, stock_logits(model, tokens, open_context))


@pytest.mark.parametrize("portable", [False, True], ids=["kernel", "portable"])
@pytest.mark.parametrize("n_ubatch", [1, 32, 100, 512])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_any_ubatch_and_threads(
    n_ubatch: int, n_threads: int, portable: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", n_head=4, n_head_kv=2, head_dim=64)
    tokens = random_tokens(model, N)
    ours = run(
        open_context(model, n_ubatch=n_ubatch, n_threads=n_threads, n_outputs=512, portable=portable), tokens, split=200
    )
    assert_equal_up_to_f16(ours, stock_logits(model, tokens, open_context))


@pytest.mark.parametrize("n_seq", [2, 3])
def test_several_sequences_in_one_batch(n_seq: int, open_model: OpenModel, open_context: OpenContext) -> None:
    """Sequences of different lengths, interleaved in one batch, then one token of each at a time."""
    model = open_model("llama", n_head=8, n_head_kv=2, head_dim=64)
    texts = [random_tokens(model, 150 + 40 * s, seed=s) for s in range(n_seq)]
    context = open_context(model, n_seq_max=n_seq, n_outputs=1024, n_ubatch=128)
    got: list[list[np.ndarray]] = [[] for _ in range(n_seq)]

    def step(parts: list[tuple[int, int, int]]) -> None:
        tokens = np.concatenate([texts[s][a:b] for s, a, b in parts])
        pos = np.concatenate([np.arange(a, b) for _, a, b in parts])
        seq = np.concatenate([np.full(b - a, s) for s, a, b in parts])
        order = np.argsort(pos, kind="stable")
        context.decode(tokens[order], pos[order], seq[order], outputs="all")
        logits = context.logits(len(tokens))
        for s, _, _ in parts:
            got[s].append(logits[seq[order] == s])

    step([(s, 0, len(t) - 5) for s, t in enumerate(texts)])
    for i in range(5, 0, -1):
        step([(s, len(t) - i, len(t) - i + 1) for s, t in enumerate(texts)])
    for s, text in enumerate(texts):
        assert_equal_up_to_f16(np.concatenate(got[s]), stock_logits(model, text, open_context))


def test_a_branch_continues_like_its_source(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", n_head=4, n_head_kv=2, head_dim=64)
    prompt = random_tokens(model, 77)
    tails = [random_tokens(model, 40, seed=s) for s in (1, 2)]
    context = open_context(model, n_seq_max=3, n_outputs=512)
    assert context.cache is not None
    context.decode(prompt, 0, 0)
    pages = context.stats().allocated_bytes
    context.branch(0, 1)
    context.branch(0, 2)
    assert context.stats().allocated_bytes == pages, "a branch costs nothing until it is written"
    for seq, tail in ((1, tails[0]), (2, tails[1]), (0, tails[1])):
        context.decode(tail, 77, seq, outputs="all")
        whole = stock_logits(model, np.concatenate([prompt, tail]), open_context)
        assert_equal_up_to_f16(context.logits(40), whole[77:])
    # all of them wrote on from the middle of a shared page: none may have written into another's
    for seq, tail in ((1, tails[0]), (2, tails[1]), (0, tails[1])):
        context.decode(tail[:1], 117, seq)
        whole = stock_logits(model, np.concatenate([prompt, tail, tail[:1]]), open_context)
        assert_equal_up_to_f16(context.logits(), whole[-1:])


def test_a_tail_can_be_taken_back(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", n_head=4, n_head_kv=2, head_dim=64)
    tokens, other = random_tokens(model, 120), random_tokens(model, 50, seed=9)
    context = open_context(model, n_outputs=512)
    context.decode(tokens, 0, 0)
    context.truncate(0, 70)
    assert context.n_seen(0) == 70
    context.decode(other, 70, 0, outputs="all")
    whole = stock_logits(model, np.concatenate([tokens[:70], other]), open_context)
    assert_equal_up_to_f16(context.logits(50), whole[70:])
