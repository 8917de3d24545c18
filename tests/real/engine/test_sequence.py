"""What a sequence knows of itself when something goes wrong in the middle, and who may go on with it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from needles import FILLER, GREEDY, LANTERN, OpenEngine, answer, document, prompt

import kvlocal
from kvlocal.engine.sequence import append
from kvlocal.errors import KVError
from kvlocal.native.context import Context
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

QUESTION = "What is the code of the lantern?"


@pytest.mark.parametrize("fault", [KVError("no pages left."), KeyboardInterrupt()])
def test_an_eviction_that_fails_half_way_is_known(
    fault: BaseException, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer is evicted, the second fails: what comes later must not take the cache for whole."""
    engine = open_engine("ada-snapkv", "64")
    cache, sequence = engine.cache, engine.sequences[0]
    assert cache is not None
    tokens = engine.tokenize(FILLER * 8)
    engine.prefill(tokens, mode="whole")
    keep = cache.keep

    def fail(seq: int, layer: int, slots: Any) -> None:
        if layer == 1:
            raise fault
        keep(seq, layer, slots)

    monkeypatch.setattr(cache, "keep", fail)
    with pytest.raises(type(fault)):
        engine.evict()
    monkeypatch.undo()
    assert sequence.evicted_at == len(tokens) and not sequence.reach(len(tokens) - 1)
    assert engine.extend([*tokens[:-5], 7, 8]), "it is read again"
    assert {int(held.sum()) for held in engine.held()} == {64 * len(engine.held()[0])}
    assert not sequence.cut(sequence.evicted_at - 3) and sequence.tokens == [] and engine.context.n_seen(0) == 0


def test_an_eviction_that_is_interrupted_at_the_end_of_a_prompt(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine("ada-snapkv", "64")
    cache = engine.cache
    assert cache is not None

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(engine.tokenize(FILLER * 8))
    monkeypatch.undo()
    assert engine.sequences[0].tokens == [] and engine.context.n_seen(0) == 0
    engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
    assert engine.report().tokens.held_mean == 64


@pytest.mark.parametrize("policy", ["full", "ada-snapkv"])
def test_an_interruption_after_the_computation_loses_no_token(
    policy: str, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is heard when the call of the library returns: the token is in the cache then."""
    engine = open_engine(policy, "64")
    engine.prefill(prompt(engine, document(LANTERN), LANTERN.question))
    decode = Context.decode
    calls = 0

    def interrupted(self: Context, *args: Any, **how: Any) -> None:
        nonlocal calls
        decode(self, *args, **how)
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Context, "decode", interrupted)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(engine.generate(24, GREEDY))
    monkeypatch.undo()
    sequence = engine.sequences[0]
    assert len(sequence.tokens) == engine.context.n_seen(0)
    report = engine.report()
    assert report.tokens.generated == 5 and report.finish_reason == "interrupted"
    assert report.text == engine.model.detokenize(sequence.tokens[-5:]), "what is in the cache was said"
    append({sequence: engine.tokenize(" again", add_special=False)})


def test_the_time_to_the_first_token_is_of_this_question(open_engine: OpenEngine) -> None:
    """Evictions while an answer grows come after its first token; an earlier turn's prompt is not this one's."""
    engine = open_engine("ada-snapkv", "64", evict_every=1)
    engine.prefill(engine.tokenize(FILLER * 20))
    answer(engine, 1)
    first = engine.report().timing
    assert first.prefill_s < first.ttft_s
    list(engine.generate(60, GREEDY))
    engine.prefill(engine.tokenize("And then?", add_special=False))
    answer(engine, 1)
    second = engine.report().timing
    assert second.prefill_s > first.prefill_s and second.ttft_s < second.prefill_s


#
# from Python: several threads, several generators, closed models
#


@pytest.fixture
def llm(tiny_path: Path) -> kvlocal.LLM:
    return kvlocal.load(tiny_path, policy="ada-snapkv", budget="256", n_threads=1)


def test_threads_queue(llm: kvlocal.LLM) -> None:
    questions = [f"{document(fact)}\n\n{fact.question}" for fact in (LANTERN,) * 4]
    alone = llm.generate(questions[0], n_predict=12, temp=0)
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = llm.generate(questions[i], n_predict=12, temp=0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(4), alone)


def test_conversations_in_several_threads(llm: kvlocal.LLM) -> None:
    """Each reads its own text again when the other has had the cache; none gets the other's answer."""
    alone = llm.chat().ask(f"{document(LANTERN)}\n\n{LANTERN.question}", n_predict=12, temp=0)
    faults: list[BaseException] = []
    answers: list[str] = []

    def talk() -> None:
        try:
            chat = kvlocal.Conversation(llm.engine)
            for _ in range(3):
                answers.append(chat.ask(f"{document(LANTERN)}\n\n{LANTERN.question}", n_predict=12, temp=0))
                chat.undo()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and answers == [alone] * 9


def test_an_edit_waits_for_its_turn(llm: kvlocal.LLM, tmp_path: Path) -> None:
    """What changes or reads the cache of a conversation waits while another thread has the engine."""
    talk = llm.chat()
    talk.ask(QUESTION, n_predict=2, temp=0)
    for edit in (lambda: talk.save(tmp_path / "a.kvl"), lambda: talk.load(tmp_path / "a.kvl"), talk.undo):
        thread = threading.Thread(target=edit)
        with llm.engine.lock:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join()


def test_a_stream_that_lost_its_cache_says_so(llm: kvlocal.LLM) -> None:
    one = llm.stream(document(LANTERN), n_predict=16, temp=0, ignore_eos=True)
    next(one)
    other = llm.stream("Tell a story.", n_predict=16, temp=0, ignore_eos=True)
    text = next(other)
    with pytest.raises(KVError, match="another one was read into its cache"):
        next(one)
    text += "".join(other)
    assert text == llm.generate("Tell a story.", n_predict=16, temp=0, ignore_eos=True)


def test_a_chat_whose_answer_was_overtaken_keeps_what_it_said(llm: kvlocal.LLM) -> None:
    first, second = llm.chat(), llm.chat()
    stream = first.stream(QUESTION, n_predict=16, temp=0, ignore_eos=True)
    said = next(stream)
    second.ask("Tell a story.", n_predict=4, temp=0)
    with pytest.raises(KVError, match="another one was read"):
        next(stream)
    assert first.messages[-1] == {"role": "assistant", "content": said}
    assert first.ask("And the tower?", n_predict=4, temp=0) and first.reread


def test_nothing_goes_on_after_close(llm: kvlocal.LLM, tmp_path: Path) -> None:
    stream = llm.stream(QUESTION, n_predict=16, temp=0, ignore_eos=True)
    next(stream)
    talk = llm.chat()
    late = llm.stream(QUESTION)
    llm.close()
    llm.close()
    for call in (
        lambda: next(stream),
        lambda: next(late),
        lambda: llm.generate(QUESTION),
        lambda: llm.chat(),
        lambda: talk.ask(QUESTION),
        lambda: talk.undo(),
        lambda: talk.save(tmp_path / "a.kvl"),
        lambda: llm.kv,
        lambda: llm.engine.tokenize("a"),
    ):
        with pytest.raises(KVError):
            call()


@pytest.mark.parametrize("policy", ["full", "ladder"])
def test_models_that_nobody_holds_are_given_back(policy: str, tiny_path: Path) -> None:
    """Also where a stream over it was left in the middle."""
    llm = kvlocal.load(tiny_path, policy=policy, n_ctx=512, n_threads=1)
    frees = [llm.engine.context._free, llm.engine.model._free]
    talk = llm.chat()
    talk.ask(QUESTION, n_predict=2, temp=0)
    stream = llm.stream(QUESTION, n_predict=8, temp=0)
    next(stream)
    assert all(free.alive for free in frees)
    del llm, talk, stream
    gc.collect()
    assert not any(free.alive for free in frees)


def test_a_change_that_fails_twice_closes_the_engine(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the new cache nor one as before can be made: nothing may touch the freed one."""
    engine = open_engine("full", "100%")
    engine.prefill(engine.tokenize(FILLER))

    def fail(_config: object) -> None:
        raise KVError("no memory today.")

    monkeypatch.setattr(engine, "_open", fail)
    with pytest.raises(KVError, match="no memory today"):
        engine.change(policy=make_policy("ladder"), budget=Budget.parse("64"))
    for call in (engine.report, engine.reset, engine.held, lambda: engine.prefill([5, 6]), lambda: answer(engine)):
        with pytest.raises(KVError, match="closed"):
            call()
