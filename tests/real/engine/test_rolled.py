"""Policies that renumber what stays: answers without an end, and a ledger that still knows every token."""

from __future__ import annotations

import pytest
from needles import FILLER, GREEDY, OpenEngine

from kvlocal.engine.sequence import append

POLICIES = {"streaming": "64", "buzz": "240"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rolled_sequence_goes_past_the_models_positions(policy: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, POLICIES[policy], {"positions": "rolled"}, n_ctx=1024)
    assert engine.n_max > engine.model.n_ctx_train
    prompt = engine.tokenize(FILLER * 8)
    engine.prefill(prompt)
    n = engine.model.n_ctx_train + 100
    assert sum(1 for _ in engine.generate(n, GREEDY)) > 0
    assert len(engine.sequences[0].tokens) > engine.model.n_ctx_train or engine.finish_reason == "stop"
    assert engine.cache is not None
    for layer in range(len(engine.cache.layers)):
        for positions in engine.cache.positions(0, layer):
            assert positions[-1] < 1024
    report = engine.report()
    assert report.kv.full_bytes == len(engine.sequences[0].tokens) * engine.cache.bytes_per_token


def test_what_was_read_since_the_last_eviction_can_be_taken_back(open_engine: OpenEngine) -> None:
    engine = open_engine("streaming", "64", {"positions": "rolled"}, evict_every=1000)
    text = engine.tokenize(FILLER * 8)
    engine.prefill(text)
    assert engine.cache is not None and engine.context.n_seen(0) == 64
    more = engine.tokenize(FILLER, add_special=False)
    for token in more:
        append({engine.sequences[0]: [token]})
    assert engine.context.n_seen(0) == 64 + len(more) and len(engine.sequences[0].tokens) == len(text) + len(more)
    assert not engine.extend([*text, *more[:-5], 5, 6]), "what changed is there, nothing else is read again"
    assert engine.sequences[0].tokens == [*text, *more[:-5], 5, 6]
    assert engine.context.n_seen(0) == 64, "the end of a prompt evicts"


def test_a_change_in_what_was_evicted_starts_anew(open_engine: OpenEngine) -> None:
    engine = open_engine("streaming", "64", {"positions": "rolled"})
    text = engine.tokenize(FILLER * 8)
    engine.prefill(text)
    assert engine.extend([*text[:20], 9, *text[20:]])
    assert len(engine.sequences[0].tokens) == len(text) + 1
    assert engine.context.n_seen(0) == 64
