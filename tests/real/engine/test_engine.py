"""The engine on a real model: when it evicts, what it holds afterwards, and what it says about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from needles import (
    FACTS,
    FILLER,
    GREEDY,
    LANTERN,
    OpenEngine,
    answer,
    document,
    first_token,
    kept_per_head,
    prompt,
)

from kvlocal.engine.engine import Engine
from kvlocal.engine.evictor import Event
from kvlocal.engine.sequence import Sequence
from kvlocal.errors import KVError, UsageError
from kvlocal.native.sampling import Sampling
from kvlocal.params import declared_rules
from kvlocal.policies import REGISTRY

SCORING = ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"]
EVICTING = [name for name in REGISTRY if name not in ("full", "buzz", "ladder")]


def assert_bytes_in_order(engine: Engine) -> None:
    stats = engine.context.stats()
    assert stats.used_bytes <= stats.allocated_bytes <= stats.peak_bytes


#
# text
#


@pytest.mark.parametrize("policy", EVICTING)
def test_the_first_token_is_that_of_the_full_cache(policy: str, open_engine: OpenEngine) -> None:
    """The step that ends in an eviction still attends to everything."""
    whole, evicting = open_engine(policy, "100%"), open_engine(policy, "48")
    for fact in FACTS[::3]:
        logits = []
        for engine in (whole, evicting):
            engine.reset()
            # up to where the value is due: here the first token is the fact itself
            asked = engine.chat_tokens([{"role": "user", "content": f"{document(fact)}\n\n{fact.question}"}])
            begun = engine.tokenize(fact.sentence.removesuffix(f" {fact.value}."), add_special=False)
            engine.prefill([*asked, *begun])
            logits.append(engine.context.logits()[0])
        assert evicting.report().tokens.held_mean == 48
        np.testing.assert_array_equal(logits[0], logits[1])
        assert f" {fact.value}".startswith(whole.model.detokenize([first_token(whole)]))


def test_a_seed_fixes_the_text(open_engine: OpenEngine) -> None:
    engine = open_engine(budget="64")

    def text(seed: int) -> str:
        engine.reset()
        engine.prefill(engine.tokenize(FILLER * 3))
        return "".join(engine.generate(40, Sampling(temp=1.2, seed=seed)))

    texts = [text(seed) for seed in range(5)]
    assert [text(seed) for seed in range(5)] == texts
    assert len(set(texts)) > 1


def test_a_repeat_penalty_ends_a_loop(open_engine: OpenEngine) -> None:
    engine = open_engine()
    texts = []
    for penalty in (1.0, 2.0):
        engine.reset()
        engine.prefill(engine.tokenize(FILLER * 2))
        texts.append("".join(engine.generate(60, Sampling(temp=0, repeat_penalty=penalty))))
    repeating, varied = (len(set(text[-30:])) for text in texts)
    assert repeating < varied


def test_the_number_of_threads_does_not_change_the_text(open_engine: OpenEngine) -> None:
    texts = []
    for n_threads in (1, 2):
        engine = open_engine(budget="128", n_threads=n_threads)
        engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
        texts.append(answer(engine))
    assert texts[0] == texts[1]


#
# budget
#


@pytest.mark.parametrize("budget", ["25%", "100", "250", "512KiB"])
@pytest.mark.parametrize("policy", EVICTING)
def test_the_prompt_ends_within_the_budget(policy: str, budget: str, open_engine: OpenEngine) -> None:
    """The total over all heads is exact, and what the policy promises to keep is there in every head."""
    wanted = {"sink": 4, "window": 24, "newest": "keep"}
    args = {key: value for key, value in wanted.items() if key in declared_rules(REGISTRY[policy])}
    engine = open_engine(policy, budget, args)
    cache = engine.cache
    assert cache is not None
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    engine.prefill(tokens)

    n, held = len(tokens), kept_per_head(engine)
    # 512 KiB are 256 tokens of 2 KiB; of these, 31 per head may be lost to half-filled pages
    per_head = {"25%": n // 4, "512KiB": 256 - 31}.get(budget) or int(budget)
    assert sum(map(len, held)) == len(held) * per_head
    for positions in held:
        window = int(args.get("window", 1))
        assert {*range(int(args.get("sink", 0)))} <= set(positions)
        assert {*range(n - window, n)} <= set(positions)
        assert (np.diff(positions) > 0).all() and positions[-1] < n
    assert engine.budget_tokens() == per_head
    assert_bytes_in_order(engine)
    if budget == "512KiB":
        assert engine.context.stats().allocated_bytes <= 512 * 1024


@pytest.mark.parametrize("policy", EVICTING)
def test_memory_stays_bounded_in_a_long_answer(policy: str, open_engine: OpenEngine) -> None:
    budget, every, n_answer = 96, 33, 400
    engine = open_engine(policy, str(budget), evict_every=every)
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 8))
    at_start = engine.context.stats().n_evict
    held = []
    for _ in engine.generate(n_answer, GREEDY):
        stats = cache.seq_stats(0)
        held.append(stats.n_slots / stats.n_heads)
        assert engine.context.stats().allocated_bytes <= (budget + every + 31) * cache.bytes_per_token
    assert engine.finish_reason == "length", "the model ended its answer: choose a text that it continues for longer"
    assert max(held) <= budget + every - 1
    # back to the budget each time, not a little at a time; all layers are evicted together
    n_times, rest = divmod(engine.context.stats().n_evict - at_start, len(cache.layers))
    assert n_times == n_answer // every and rest == 0
    assert min(held) == budget
    assert engine.context.n_seen(0) == len(engine.sequences[0].tokens)


def test_a_growing_share_is_a_growing_budget(open_engine: OpenEngine) -> None:
    """25 % are a quarter of what was seen so far, not of the prompt."""
    engine = open_engine(budget="25%", evict_every=17)
    assert engine.cache is not None
    engine.prefill(engine.tokenize(FILLER * 6))
    n = len(engine.sequences[0].tokens)
    answer(engine, 300)
    assert engine.budget_tokens() == (n + 300) // 4
    held = engine.report().tokens.held_mean
    assert (n + 300 - 16 * 4) // 4 <= held <= (n + 300) // 4 + 16


#
# chunks
#


@pytest.mark.parametrize("policy", EVICTING)
def test_chunks_bound_the_peak(policy: str, open_engine: OpenEngine) -> None:
    """3,900 tokens through a cache with room for a quarter of them."""
    budget, chunk = 300, 256
    engine = open_engine(policy, str(budget), prefill="chunked", chunk=chunk, n_ctx=1024)
    cache = engine.cache
    assert cache is not None
    tokens = engine.tokenize(FILLER * 120)[:3900]
    done: list[tuple[int, int]] = []
    engine.prefill(tokens, on_progress=lambda n, total: done.append((n, total)))
    assert done == [(min(n + chunk, 3900), 3900) for n in range(0, 3900, chunk)]
    stats = cache.seq_stats(0)
    assert stats.n_seen == 3900
    assert stats.n_slots == budget * stats.n_heads
    # a head wastes less than one page of 32 slots
    assert engine.report().kv.peak_bytes <= (budget + chunk + 32) * cache.bytes_per_token
    assert engine.report().kv.full_bytes == 3900 * cache.bytes_per_token


def test_a_long_text_in_chunks_takes_twice_the_budget_at_most(open_engine: OpenEngine, log_text: str) -> None:
    """7,000 tokens, chunk and budget of 512: never more than 1,100 tokens per head."""
    engine = open_engine(budget="512", prefill="chunked", chunk=512, n_ctx=8192)
    assert engine.cache is not None
    engine.prefill(engine.tokenize(log_text * 4)[:7000])
    assert engine.report().tokens.prompt == 7000
    assert engine.report().tokens.held_mean == 512
    assert engine.report().kv.peak_bytes <= 1100 * engine.cache.bytes_per_token


def test_an_exact_prompt_is_held_whole_once(open_engine: OpenEngine) -> None:
    """Across several passes, and also where the limit of an earlier turn would have cut it."""
    engine = open_engine(budget="64", n_ubatch=128, evict_every=9)
    cache = engine.cache
    assert cache is not None
    engine.prefill(engine.tokenize(FILLER * 3))
    before = cache.seq_stats(0).n_slots / cache.seq_stats(0).n_heads
    assert before == 64
    held: list[float] = []

    def on_progress(done: int, total: int) -> None:
        stats = cache.seq_stats(0)
        held.append(stats.n_slots / stats.n_heads)

    tokens = engine.tokenize(FILLER * 12, add_special=False)
    engine.prefill(tokens, on_progress=on_progress)
    passes = [*range(128, len(tokens), 128)]
    assert held == [*(64 + n for n in passes), 64]
    assert engine.report().kv.peak_bytes >= (64 + len(tokens)) * cache.bytes_per_token


#
# refusals and interruptions leave things as they were
#


@pytest.mark.parametrize("policy", ["full", "ada-snapkv"])
def test_a_prompt_that_is_too_long_changes_nothing(policy: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, "128", n_ctx=1024)
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    engine.prefill(tokens)
    held, stats, ledger = engine.report().tokens, engine.context.stats(), list(engine.sequences[0].tokens)
    with pytest.raises(UsageError) as refusal:
        engine.prefill([300] * 3000)
    held_mean = len(tokens) if policy == "full" else 128
    for part in ("3000 tokens", f"room for {1024 - held_mean - 1}", f"{len(tokens)} already", "--prefill chunked"):
        assert part in str(refusal.value)
    with pytest.raises(UsageError, match="prompt is empty"):
        engine.prefill([])
    assert engine.report().tokens == held
    assert engine.context.stats().used_bytes == stats.used_bytes
    assert engine.sequences[0].tokens == ledger and engine.context.n_seen(0) == len(ledger)
    assert answer(engine, 4) == "The code of the"


def test_a_prompt_that_just_fits_is_read(open_engine: OpenEngine) -> None:
    for policy in ("full", "ada-snapkv"):
        engine = open_engine(policy, "128", n_ctx=512)
        tokens = engine.tokenize(FILLER * 20)
        with pytest.raises(UsageError, match="512 tokens, the context has room for 511"):
            engine.prefill(tokens[:512])
        engine.prefill(tokens[:511])
        assert answer(engine, 1) != ""


@pytest.mark.parametrize("prefill", ["exact", "chunked"])
def test_an_interrupted_prompt_leaves_no_half(prefill: str, open_engine: OpenEngine) -> None:
    """Rolled back to what was there before, or to nothing where a chunk has already evicted some of that."""
    engine = open_engine(budget="64", prefill=prefill, chunk=128, n_ubatch=128)

    def stop(done: int, total: int) -> None:
        if done == 256:
            raise KeyboardInterrupt

    first = engine.tokenize(FILLER)
    engine.prefill(first)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(engine.tokenize(FILLER * 12, add_special=False), on_progress=stop)
    left = first if prefill == "exact" else []
    assert engine.sequences[0].tokens == left
    assert engine.context.n_seen(0) == len(left)
    assert [len(held) for held in kept_per_head(engine)] == [len(left)] * len(kept_per_head(engine))
    engine.extend(prompt(engine, document(LANTERN), "") if prefill == "chunked" else [*first, 300])


def test_a_failing_eviction_is_an_error_and_not_a_crash(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(budget="64")

    def fail(sequence: Sequence, event: Event, **_how: object) -> bool:
        raise KVError("no scores today.")

    monkeypatch.setattr(engine.evictor, "after", fail)
    with pytest.raises(KVError, match="no scores today"):
        engine.prefill(engine.tokenize(FILLER * 8))
    assert engine.sequences[0].tokens == [] and engine.context.n_seen(0) == 0
    monkeypatch.undo()
    engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
    assert engine.report().tokens.held_mean == 64


def test_an_eviction_that_fails_in_an_answer_keeps_the_books(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(budget="64", evict_every=9)
    engine.prefill(engine.tokenize(FILLER * 4))

    def fail(sequence: Sequence, event: Event, **_how: object) -> bool:
        raise KVError("no scores today.")

    monkeypatch.setattr(engine.evictor, "after", fail)
    with pytest.raises(KVError, match="no scores today"):
        answer(engine, 40)
    assert len(engine.sequences[0].tokens) == engine.context.n_seen(0)
    monkeypatch.undo()
    answer(engine, 40)
    assert engine.finish_reason == "length"


@pytest.mark.parametrize("budget", ["2048", "500"])
def test_an_answer_that_fills_the_context_ends(budget: str, open_engine: OpenEngine) -> None:
    """Also where the budget is larger than the context, or nearly as large: 2048 is the default."""
    engine = open_engine(budget=budget, n_ctx=512)
    engine.prefill(engine.tokenize(FILLER))
    answer(engine, 800)
    assert engine.finish_reason == "length"
    assert engine.report().tokens.held_mean <= 512


#
# figures
#


def test_the_report_has_the_contract_s_keys(open_engine: OpenEngine) -> None:
    engine = open_engine(budget="25%")
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    engine.prefill(tokens)
    text = answer(engine, 4)
    report = engine.report().as_dict()
    assert {name: sorted(value) if isinstance(value, dict) else None for name, value in report.items()} == {
        "text": None,
        "model": None,
        "policy": None,
        "policy_args": sorted(["alpha", "agg", "compat", "kernel", "pool", "safeguard", "sink", "window"]),
        "budget": ["bytes", "fraction", "tokens"],
        "tokens": ["generated", "held_max", "held_mean", "held_min", "prompt"],
        "kv": ["allocated_bytes", "fixed_bytes", "full_bytes", "peak_bytes", "used_bytes"],
        "reads": None,
        "archive": None,
        "rss": ["after_evict_bytes", "before_evict_bytes", "peak_bytes"],
        "timing": ["decode_s", "decode_tps", "evict_s", "load_s", "prefill_s", "prefill_tps", "ttft_s"],
        "finish_reason": None,
    }
    assert (report["text"], report["model"], report["policy"]) == (text, "kvlocal-tiny", "ada-snapkv")
    assert report["finish_reason"] == "length"
    n, budget = len(tokens), report["budget"]
    assert budget["tokens"] == (n + 4) // 4
    assert budget["fraction"] == pytest.approx(0.25, abs=1 / n)
    assert budget["bytes"] == budget["tokens"] * 2048
    assert (report["tokens"]["prompt"], report["tokens"]["generated"]) == (n, 4)
    assert report["tokens"]["held_mean"] == n // 4 + 4
    held = [len(positions) for positions in kept_per_head(engine)]
    assert (report["tokens"]["held_min"], report["tokens"]["held_max"]) == (min(held), max(held))
    assert report["kv"]["used_bytes"] == sum(held) * 2048 // 8
    assert report["kv"]["full_bytes"] == (n + 4) * 2048
    assert all(seconds > 0 for seconds in report["timing"].values())


@pytest.mark.parametrize("policy", ["full", *EVICTING])
def test_nothing_is_in_use_after_a_reset(policy: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, "64", n_seq_max=2)
    for seq in range(2):
        engine.prefill(prompt(engine, document(LANTERN), LANTERN.question), sequence=engine.sequences[seq])
        assert_bytes_in_order(engine)
    answer(engine, 8)
    assert_bytes_in_order(engine)
    assert engine.context.stats().used_bytes > 0
    engine.reset()
    stats = engine.context.stats()
    assert stats.used_bytes == 0 == stats.full_bytes
    if engine.cache is not None:
        assert stats.allocated_bytes == 0 == stats.peak_bytes
    assert engine.report().tokens.prompt == 0 == engine.report().tokens.generated
    assert engine.report().finish_reason is None


def test_when_the_evictor_acts(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a chunk, at the end of the prompt, and past the limit while decoding."""
    engine = open_engine("streaming", "64", prefill="chunked", chunk=128, evict_every=11)
    events: list[str] = []
    after = engine.evictor.after

    def noted(sequence: Sequence, event: Event, **how: Any) -> bool:
        evicted = after(sequence, event, **how)
        if evicted:
            events.append(event)
        return evicted

    monkeypatch.setattr(engine.evictor, "after", noted)
    engine.prefill(engine.tokenize(FILLER * 10)[:300])
    list(engine.generate(23, GREEDY))
    assert events == ["chunk", "chunk", "prompt", "step", "step"]


def test_an_answer_that_must_not_end_goes_on_to_its_limit(open_engine: OpenEngine) -> None:
    engine = open_engine("streaming", "64")
    engine.prefill(engine.chat_tokens([{"role": "user", "content": FILLER}]))
    ended = "".join(engine.generate(200, GREEDY))
    assert engine.finish_reason == "stop", "choose a prompt whose answer ends"
    engine.reset()
    engine.prefill(engine.chat_tokens([{"role": "user", "content": FILLER}]))
    text = "".join(engine.generate(200, Sampling(temp=0, ignore_eos=True)))
    assert engine.finish_reason == "length" and text.startswith(ended) and len(text) > len(ended)
