"""Storage in fewer bits, from the engine's side: bytes, what is demoted when, and what it costs in quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from needles import FILLER, GREEDY, LANTERN, OpenEngine, answer, document, prompt

from kvlocal.engine.engine import Engine
from kvlocal.errors import UsageError
from kvlocal.eval.records import Store, rows
from kvlocal.eval.stage import StageConfig
from kvlocal.eval.texts import Kld, excerpts
from kvlocal.measure.variants import expand
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.formats import FORMATS
from kvlocal.native.model import Model
from kvlocal.storage.schedule import log_positions
from kvlocal.storage.storage import Storage

BITS = {"q8": 8.5, "q4": 4.5, "kv3": 2.75, "kv2": 2.25}


def expected_bytes(engine: Engine, n_f16: float, n_demoted: float) -> float:
    assert engine.cache is not None
    return engine.cache.bytes_per_token * (n_f16 + n_demoted * BITS[engine.config.storage.name] / 16)


@pytest.mark.parametrize("name", ["q8", "q4", "kv3", "kv2"])
@pytest.mark.parametrize(("policy", "budget"), [("full", "100%"), ("streaming", "300"), ("ada-snapkv", "50%")])
def test_all_but_sinks_and_tail_is_demoted(name: str, policy: str, budget: str, open_engine: OpenEngine) -> None:
    storage = Storage(name, sink=8, tail=64)
    engine = open_engine(policy, budget, n_ctx=1024, storage=storage)
    tokens = engine.tokenize(FILLER * 20)[:600]
    engine.prefill(tokens)
    stats = engine.context.stats()
    held = engine.report().tokens.held_mean
    assert engine.cache is not None
    heads = [p for layer in range(len(engine.cache.layers)) for p in engine.cache.positions(0, layer)]
    n_f16 = np.mean([(p < 8).sum() + (p >= 600 - 64).sum() for p in heads])
    assert stats.used_bytes == pytest.approx(expected_bytes(engine, n_f16, held - n_f16))


def test_demotion_goes_on_while_it_answers(open_engine: OpenEngine) -> None:
    """Nothing is evicted, and yet no more than the tail and what was decoded since stays in f16."""
    engine = open_engine("full", n_ctx=1024, storage=Storage("q8", sink=0, tail=32), evict_every=16)
    engine.prefill(engine.tokenize(FILLER)[:50])
    n = 0
    for _ in engine.generate(200, GREEDY):
        n += 1
        seen = len(engine.sequences[0].tokens)
        used = engine.context.stats().used_bytes
        assert used <= expected_bytes(engine, 32 + 16, seen - 48) or seen < 32 + 64 + 16
    assert n > 100, "the model ended its answer: choose a text that it continues for longer"


def test_a_budget_in_bytes_counts_what_is_really_stored(open_engine: OpenEngine) -> None:
    held = {}
    for storage in (Storage(), Storage("q8", sink=8, tail=32), Storage("q4", sink=8, tail=32)):
        engine = open_engine("streaming", "768KiB", n_ctx=2048, storage=storage)
        engine.prefill(engine.tokenize(FILLER * 60)[:1500])
        assert engine.context.stats().allocated_bytes <= 768 * 1024
        held[storage.name] = engine.report().tokens.held_mean
    assert held["q8"] > 1.2 * held["f16"] and held["q4"] > 1.2 * held["q8"]


@pytest.mark.parametrize("name", ["q8", "q4", "kv3"])
def test_a_fact_is_found_in_demoted_pages(name: str, open_engine: OpenEngine) -> None:
    engine = open_engine("full", n_ctx=1024, storage=Storage(name, sink=0, tail=16))
    engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
    assert LANTERN.value in answer(engine)


def test_a_conversation_can_be_taken_back_into_what_is_demoted(open_engine: OpenEngine) -> None:
    engine = open_engine("full", n_ctx=1024, storage=Storage("q8", sink=0, tail=32))
    tokens = engine.tokenize(FILLER * 12)
    engine.prefill(tokens)
    assert not engine.extend([*tokens[:100], 5, 6])
    assert engine.sequences[0].tokens == [*tokens[:100], 5, 6] and engine.context.n_seen(0) == 102
    assert engine.report().tokens.held_mean == 102
    engine.reset()
    assert engine.context.stats().used_bytes == 0


def test_divergence_falls_with_the_bits(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(document(LANTERN, before=12, after=24))
    model = Model(tiny_path)
    found = excerpts(model, [path], 384, 48, 2)
    storages = ("f16", *BITS)
    variants = expand(["full", "paged", "streaming"], {}, ["80%"], storages)
    assert len(variants) == 13
    store = Store(tmp_path / "records.jsonl")
    config = StageConfig(n_ctx=512, parallel=2, n_ubatch=128, n_threads=1)
    table = {(r["policy"], r["storage"]): r for r in rows(Kld(model, found, variants, config, store).run())}
    assert table["paged", "f16"]["kl"] == 0
    assert table["full", "q8"]["held"] == pytest.approx(8.5 / 16, rel=1e-4)
    assert 0 < table["full", "q8"]["kl"] < table["full", "q4"]["kl"], "llama.cpp's own"
    for name in ("paged", "streaming"):
        found_bytes = [table[name, storage]["used_bytes"] for storage in storages]
        assert found_bytes == sorted(found_bytes, reverse=True) and len(set(found_bytes)) == 5
    assert 0 < table["paged", "q8"]["kl"] < table["paged", "q4"]["kl"] < table["paged", "kv2"]["kl"]


@pytest.mark.parametrize("name", ["kivi", "kivi:group=64", "kivi:bits=4"])
def test_kivi_demotes_whole_groups_that_have_left_the_tail(name: str, open_engine: OpenEngine) -> None:
    storage = Storage.parse(name, tail=64)
    engine = open_engine("full", n_ctx=1024, storage=storage)
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 20)[:500])
    answer(engine, 150)
    n_seen = cache.seq_stats(0).n_seen
    assert n_seen > 600
    for layer in range(len(cache.layers)):
        for positions, formats in zip(cache.positions(0, layer), cache.slot_formats(0, layer), strict=True):
            n_kivi = int((formats == FORMATS.index("kivi")).sum())
            assert n_kivi % storage.group == 0 and (formats[n_kivi:] == 0).all()
            # a group waits until it is full, and then until the engine looks again
            assert 64 <= len(positions) - n_kivi < 64 + storage.group + 32


@pytest.mark.parametrize("name", ["logquant", "logquant:quantizer=token"])
def test_logquant_keeps_the_log_set_in_f16(name: str, open_engine: OpenEngine) -> None:
    engine = open_engine("full", n_ctx=1024, storage=Storage.parse(name, tail=96), prefill="exact")
    cache = engine.cache
    assert cache is not None
    text = engine.tokenize(FILLER * 30)
    for n_seen in (40, 200, 500, 777):
        engine.prefill(text[len(engine.sequences[0].tokens) : n_seen])
        log_set = set(log_positions(n_seen, 32).tolist())
        for layer in range(len(cache.layers)):
            for positions, formats in zip(cache.positions(0, layer), cache.slot_formats(0, layer), strict=True):
                in_f16 = set(positions[formats == 0].tolist())
                # the latest tokens, whose queries score, are in the set; what waits for its group is not
                waiting = in_f16 - log_set
                assert log_set <= in_f16 and len(waiting) < (1 if "token" in name else 32)


@pytest.mark.parametrize("name", ["kivi", "logquant"])
@pytest.mark.parametrize("policy", ["ada-snapkv", "h2o", "streaming"])
def test_groups_are_evicted_whole_and_memory_stays_bounded(name: str, policy: str, open_engine: OpenEngine) -> None:
    budget = 250
    engine = open_engine(policy, str(budget), n_ctx=1024, storage=Storage.parse(name, tail=48))
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 20)[:600])
    pages = []
    for _ in engine.generate(300, GREEDY):
        pages.append(cache.seq_stats(0).page_bytes)
        assert cache.seq_stats(0).n_slots / cache.seq_stats(0).n_heads <= budget + 32
    for layer in range(len(cache.layers)):
        for groups in cache.kivi_groups(0, layer):
            assert all((groups == g).sum() == 32 for g in set(groups[groups >= 0].tolist()))
    assert len(pages) > 200 and max(pages[-100:]) <= 1.1 * max(pages[:100])


MOST_BITS = {"q4": 4.9, "kv3": 3.2, "kv2": 2.7, "kivi": 3.3, "logquant": 3.3}
"""Per value at 8,192 tokens: scales, sinks, tail and what is not full of the last pages, all in."""


def test_bits_per_value_of_a_long_text_with_everything_counted(tiny_path: Path) -> None:
    model = Model(tiny_path)
    formats = tuple({Storage(name).format for name in MOST_BITS})
    config = ContextConfig(8200, n_seq_max=2, formats=formats, rotate=True, n_window=0)
    with Context(model, config) as context:
        cache = context.cache
        assert cache is not None
        for begin in range(0, 8192, 512):
            context.decode(np.arange(512) % 97 + 100, begin, 0)
        for name, most in MOST_BITS.items():
            context.branch(0, 1)
            Storage(name).store(cache, 1, 0)
            stats = cache.seq_stats(1)
            bits = stats.page_bytes * 16 / stats.full_bytes
            print(f"{name}: {bits:.3f} bits")
            assert BITS.get(name, 3) < bits <= most
            context.truncate(1, 0)
    model.close()


def test_a_budget_that_sinks_and_tail_take_is_refused(open_engine: OpenEngine) -> None:
    with pytest.raises(UsageError, match="sinks and tail of the storage q4 alone take .* MiB"):
        open_engine("streaming", "64KiB", storage=Storage("q4"))


def test_what_cannot_be_stored_is_refused(open_engine: OpenEngine) -> None:
    with pytest.raises(UsageError, match="no storage 'q5' for the KV cache; give f16, q8, q4, kv3, kv2"):
        Storage("q5")
    with pytest.raises(UsageError, match="The tail of the storage is -1"):
        Storage("q8", tail=-1)
