"""The ladder in an engine: bytes that hold, whatever is read and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from needles import FILLER, GREEDY, LANTERN, OpenEngine, answer, document, prompt

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.errors import UsageError
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage


def rungs(engine: Engine) -> np.ndarray:
    """Slots per format."""
    assert engine.cache is not None
    formats = [np.concatenate(engine.cache.slot_formats(0, i)) for i in range(len(engine.cache.layers))]
    return np.bincount(np.concatenate(formats), minlength=5)


@pytest.mark.parametrize(("budget", "tokens"), [("25%", 111), ("100", 100), ("250", 250), ("512KiB", 256)])
def test_the_prompt_ends_within_the_bytes_of_its_budget(budget: str, tokens: int, open_engine: OpenEngine) -> None:
    engine = open_engine("ladder", budget)
    assert engine.cache is not None
    engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
    allocated = engine.context.stats().allocated_bytes
    assert engine.budget_tokens() == tokens
    assert 0.9 * tokens * engine.cache.bytes_per_token < allocated <= tokens * engine.cache.bytes_per_token
    assert engine.report().tokens.held_mean > tokens
    assert (rungs(engine)[1:] > 0).any()


def test_memory_stays_bounded_in_a_long_answer(open_engine: OpenEngine) -> None:
    budget, every = 96, 33
    engine = open_engine("ladder", str(budget), evict_every=every)
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 8))
    at_start = engine.context.stats().n_evict
    sizes = []
    for _ in engine.generate(400, GREEDY):
        sizes.append(engine.context.stats().allocated_bytes / cache.bytes_per_token)
    # pages of new tokens are opened whole
    assert max(sizes) <= budget + every + 31
    assert min(sizes) > budget - 32
    assert 400 // every - 1 <= (engine.context.stats().n_evict - at_start) / len(cache.layers) <= 400 // every + 1


def test_chunks_bound_the_peak_and_more_is_held_than_the_context_has_room_for(open_engine: OpenEngine) -> None:
    budget, chunk = 300, 256
    engine = open_engine("ladder", str(budget), prefill="chunked", chunk=chunk, n_ctx=768)
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 120)[:3900])
    assert cache.seq_stats(0).n_seen == 3900
    assert cache.seq_stats(0).page_bytes <= budget * cache.bytes_per_token
    assert engine.report().kv.peak_bytes <= (budget + chunk + 32) * cache.bytes_per_token
    held = np.concatenate(cache.held(0))
    assert held.max() <= 768 + 64 and held.mean() > 500
    assert len(answer(engine, 100)) > 100


def test_several_turns_go_on_where_the_last_one_ended(open_engine: OpenEngine) -> None:
    engine = open_engine("ladder", "128", n_ctx=1024)
    cache = engine.cache
    assert cache is not None
    for _ in range(4):
        engine.prefill(engine.tokenize(FILLER * 9))
        assert cache.seq_stats(0).page_bytes <= 128 * cache.bytes_per_token
        answer(engine, 30)


def test_a_storage_beside_it_is_refused() -> None:
    with pytest.raises(UsageError, match="ladder says itself how tokens are stored; leave out the storage q4"):
        EngineConfig(Path("model.gguf"), make_policy("ladder"), Budget.parse("25%"), storage=Storage("q4"))
