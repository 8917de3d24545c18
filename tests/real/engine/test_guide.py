"""Chunked prompts that know their question: `guide`."""

from __future__ import annotations

import numpy as np
import pytest
from needles import FACTS, FILLER, OpenEngine, answer, document, kept_per_head, prompt

from kvlocal.engine.evictor import guided_scores
from kvlocal.engine.sequence import append
from kvlocal.errors import UsageError

WIDE = {"kernel": 15, "window": 16}


def test_a_guide_finds_what_chunks_alone_forget(open_engine: OpenEngine) -> None:
    """The fact lies in an early chunk, whose own end asks for nothing."""
    shared = {"prefill": "chunked", "chunk": 64}
    blind = open_engine("ada-snapkv", "96", WIDE, **shared)
    guided = open_engine("ada-snapkv", "96", WIDE, guide=16, **shared)
    found = {"blind": 0, "guided": 0}
    for fact in FACTS:
        for name, engine in (("blind", blind), ("guided", guided)):
            engine.reset()
            engine.prefill(prompt(engine, document(fact, before=2, after=20), fact.question))
            found[name] += answer(engine) == fact.sentence
    assert found["guided"] >= found["blind"] + 4
    assert found["guided"] >= len(FACTS) // 2


@pytest.mark.parametrize("policy", ["snapkv", "ada-pyramid", "tova"])
def test_the_guide_leaves_no_trace(policy: str, open_engine: OpenEngine) -> None:
    """Bounded peak, exact budget, true positions, and the tokens of the prompt in their order."""
    budget, chunk, guide = 96, 128, 32
    engine = open_engine(policy, str(budget), prefill="chunked", chunk=chunk, guide=guide, n_ctx=512)
    cache = engine.cache
    assert cache is not None
    tokens = engine.tokenize(FILLER * 40)[:1000]
    engine.prefill(tokens)
    assert engine.sequences[0].tokens == tokens
    stats = cache.seq_stats(0)
    assert stats.n_seen == 1000 and stats.n_slots == budget * stats.n_heads
    assert all((np.diff(held) > 0).all() and held[-1] < 1000 for held in kept_per_head(engine))
    assert engine.report().kv.peak_bytes <= (budget + chunk + guide + 32) * cache.bytes_per_token
    assert answer(engine, 4)


def test_a_short_prompt_needs_no_guide(open_engine: OpenEngine) -> None:
    shared = {"prefill": "chunked", "chunk": 64}
    engines = [open_engine("snapkv", "400", guide=guide, **shared) for guide in (0, 32)]
    for engine in engines:
        engine.prefill(engine.tokenize(FILLER * 5))
    np.testing.assert_array_equal(*(engine.context.logits() for engine in engines))


def test_what_cannot_be_guided(open_engine: OpenEngine) -> None:
    with pytest.raises(UsageError, match="give --prefill chunked"):
        open_engine("snapkv", "64", guide=16)
    with pytest.raises(UsageError, match="streaming does not look at attention scores"):
        open_engine("streaming", "64", prefill="chunked", guide=16)
    with pytest.raises(UsageError, match="a chunk of 100 and a guide of 400 do not fit into a context of 512"):
        open_engine("snapkv", "64", prefill="chunked", chunk=100, guide=400, n_ctx=512)


@pytest.mark.parametrize("policy, guide", [("snapkv", 64), ("ladder", 16)])
def test_the_whole_guide_looks_and_nothing_else(policy: str, guide: int, open_engine: OpenEngine) -> None:
    """SnapKV's own window is shorter than this guide, the ladder looks with more queries than this one has."""
    engine = open_engine(policy, "96", prefill="chunked", chunk=256, guide=guide, n_ctx=1024, n_seq_max=2)
    cache, (text, branch) = engine.cache, engine.sequences
    assert cache is not None
    tokens = engine.tokenize(FILLER * 20)
    append({text: tokens[:256]}, outputs="none")
    text.branch(branch)
    ends = tokens[-guide:]
    scores = guided_scores(text, ends, rms=engine.policy.rms)
    assert len(text.tokens) == 256 == engine.context.n_seen(0)
    append({branch: ends}, outputs="none")
    for layer, got in enumerate(scores):
        want = cache.window_scores(1, layer, guide, engine.policy.rms)[:, :256]
        np.testing.assert_allclose(got, want, atol=1e-6)
        other = cache.window_scores(1, layer, guide // 2, engine.policy.rms)[:, :256]
        assert np.abs(got - other).max() > 1e-4, "half of the guide is something else"


def test_a_guide_longer_than_a_batch(open_engine: OpenEngine) -> None:
    engine = open_engine("snapkv", "64", prefill="chunked", chunk=128, guide=300, n_batch=128, n_ctx=1024)
    engine.prefill(engine.tokenize(FILLER * 30))
    assert answer(engine, 4) and engine.report().tokens.held_mean <= 100
