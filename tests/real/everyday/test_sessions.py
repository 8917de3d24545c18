"""A conversation saved, loaded, taken back and answered again on the default model."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needles import OpenEngine

from kvlocal.engine import session as session_module
from kvlocal.engine.chat import Chat
from kvlocal.engine.engine import Engine
from kvlocal.engine.session import MAGIC, Session, load, prefill_cached, save
from kvlocal.errors import KVError, UsageError
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

GREEDY = Sampling(temp=0)
STORY = "The lighthouse keeper Ada counted ships at dusk and wrote their names into a blue book. " * 30
SETTINGS = [
    ("full", "100%", "f16"),
    ("ada-snapkv", "128", "f16"),
    ("ladder", "128", "f16"),
    ("streaming", "160", "kivi"),
]


def say(chat: Chat, text: str, n: int = 12) -> str:
    return "".join(chat.ask(text, n, GREEDY))


def open_with(open_engine: OpenEngine, policy: str, budget: str, kv: str) -> Engine:
    tail = 32 if kv != "f16" else 128
    return open_engine(policy=policy, budget=budget, n_ctx=2048, storage=Storage.parse(kv, tail=tail))


@pytest.mark.parametrize(("policy", "budget", "kv"), SETTINGS)
def test_a_loaded_conversation_goes_on_as_if_it_had_not_been_saved(
    policy: str, budget: str, kv: str, open_engine: OpenEngine, tmp_path: Path
) -> None:
    engine = open_with(open_engine, policy, budget, kv)
    chat = Chat(engine, "Be brief.")
    say(chat, STORY + "Who counted ships?")
    chat.save(tmp_path / "s")
    held = [h.tolist() for h in engine.held()]
    went_on = say(chat, "And what colour is the book?", 24)
    again = Chat(engine)
    engine.reset()
    again.load(tmp_path / "s")
    assert [h.tolist() for h in engine.held()] == held
    assert again.messages[0] == {"role": "system", "content": "Be brief."}
    assert say(again, "And what colour is the book?", 24) == went_on
    assert not again.reread


def test_the_next_token_of_a_restored_prompt_is_the_same(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    for sampling in (GREEDY, Sampling(temp=1.0, seed=7)):
        engine.reset()
        engine.prefill(engine.tokenize(STORY))
        save(tmp_path / "s", engine, Session())
        text = "".join(engine.generate(20, sampling))
        engine.reset()
        assert load(tmp_path / "s", engine) == Session(budget="128")
        assert "".join(engine.generate(20, sampling)) == text


@pytest.mark.parametrize(("policy", "budget", "kv"), SETTINGS[:3])
def test_another_answer_to_the_same_question_begins_where_the_first_did(
    policy: str, budget: str, kv: str, open_engine: OpenEngine
) -> None:
    engine = open_with(open_engine, policy, budget, kv)
    chat = Chat(engine)
    first = say(chat, STORY + "Who counted ships?", 24)
    assert "".join(chat.again(24, GREEDY)) == first
    assert not chat.reread, "the eviction came before the answer, so nothing of the question is missing"
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_a_turn_taken_back_leaves_no_trace(open_engine: OpenEngine) -> None:
    engine = open_with(open_engine, "full", "100%", "f16")
    chat = Chat(engine)
    say(chat, "Name a river.")
    tokens, messages = list(engine.sequences[0].tokens), [dict(m) for m in chat.messages]
    want = say(chat, "Name a mountain.")
    assert chat.undo() == "Name a mountain."
    assert engine.sequences[0].tokens == tokens and chat.messages == messages
    assert say(chat, "Name a mountain.") == want and not chat.reread


def test_what_was_evicted_is_read_again_after_an_edit(open_engine: OpenEngine) -> None:
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    chat = Chat(engine)
    say(chat, "Hello.")
    say(chat, STORY + "Who counted ships?")
    chat.undo()
    say(chat, "Name a river.")
    assert chat.reread
    chat.set_system("Answer in French.")
    say(chat, "Name a mountain.")
    assert chat.reread and chat.system == "Answer in French."
    while any(m["role"] == "user" for m in chat.messages):
        chat.undo()
    with pytest.raises(UsageError, match="Nothing was asked yet"):
        chat.undo()


def test_policy_and_budget_change_in_the_middle(open_engine: OpenEngine) -> None:
    engine = open_with(open_engine, "ladder", "512", "f16")
    chat = Chat(engine)
    say(chat, STORY + "Who counted ships?")
    before = engine.kv(engine.sequences[0])["used_bytes"]
    assert not engine.change(budget=Budget.parse("128")), "the cache stays"
    say(chat, "And when?")
    assert engine.kv(engine.sequences[0])["used_bytes"] < before / 2 and not chat.reread
    assert not engine.change(policy=make_policy("snapkv")), "its window is shorter, its formats are fewer"
    assert engine.change(policy=make_policy("h2o")), "it needs the attention mass, which was not counted"
    chat.forget_cache()
    say(chat, "And why?")
    assert chat.reread and engine.policy.name == "h2o"
    with pytest.raises(UsageError, match="too small"):
        engine.change(policy=make_policy("ladder"), budget=Budget.parse("8"))
    assert str(engine.config.budget) == "128" and engine.policy.name == "h2o" and engine.sequences[0].tokens


def test_a_session_of_other_settings_is_read_again_and_says_why(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    path = tmp_path / "s"
    with pytest.raises(UsageError, match="nothing to save"):
        save(path, engine, Session())
    chat = Chat(engine)
    say(chat, STORY)
    chat.save(path)
    for change, reason in (
        ({"policy": make_policy("snapkv")}, "another policy: ada-snapkv, now snapkv"),
        ({"policy": make_policy("ada-snapkv", {"kernel": "5"})}, "other parameters of the policy: kernel 7, now 5"),
        ({"storage": Storage("q4")}, r"another storage \(--kv\): name f16, now q4"),
    ):
        config, engine.config = engine.config, replace(engine.config, **change)
        found = load(path, engine)
        assert re.search(reason, found.dropped) and found.messages == chat.messages
        assert engine.sequences[0].tokens == []
        engine.config = config
    assert not load(path, engine).dropped and engine.sequences[0].tokens
    with pytest.raises(UsageError, match="There is no session"):
        load(tmp_path / "none", engine)
    with pytest.raises(UsageError, match="is not a session"):
        load(Path(__file__), engine)


def contents(path: Path) -> dict[str, Any]:
    """What a session file says that it holds, read without kvlocal's own reader."""
    data = path.read_bytes()[: -hashlib.sha256().digest_size]
    start = len(MAGIC) + 8
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    header = json.loads(data[start:end])
    held = {name: header[name] for name in ("rolled", "evicted_at", "session")}
    for name, size in header["parts"].items():
        held[name], end = data[end : end + size], end + size
    return held


def damaged(whole: bytes, i: int, rng: np.random.Generator) -> bytes:
    """Cut off, or with three bits turned: anywhere, near the beginning, or in the header with the sum made right."""
    data = bytearray(whole)
    if i % 4 == 0:
        del data[rng.integers(len(data)) :]
        return bytes(data)
    n_header = int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8], "little")
    end = {1: len(data), 2: 2000, 3: n_header if i % 8 == 3 else len(data) - 32}[i % 4]
    for at in rng.choice(end, 3, replace=False):
        data[at] ^= 1 << rng.integers(8)
    if i % 4 == 3:
        data[-32:] = hashlib.sha256(data[:-32]).digest()
    return bytes(data)


def test_two_hundred_damaged_sessions_are_refused(open_engine: OpenEngine, tmp_path: Path) -> None:
    """With a wrong sum all are, and change nothing. With a right one a file is refused, or the engine holds what it
    says to the bit."""
    engine = open_with(open_engine, "ladder", "128", "f16")
    say(Chat(engine), STORY)
    path, again = tmp_path / "s", tmp_path / "again"
    save(path, engine, Session([{"role": "user", "content": "?"}]))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = {"refused": 0, "loaded": 0}
    for i in range(200):
        path.write_bytes(damaged(whole, i, rng))
        before = list(engine.sequences[0].tokens)
        try:
            session = load(path, engine)
        except KVError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, i
            assert engine.sequences[0].tokens in ([before] if i % 4 != 3 else [before, []]), i
            outcomes["refused"] += i % 4 == 3
        else:
            assert i % 4 == 3, f"{i}: a wrong sum was taken"
            save(again, engine, session)
            said, held = contents(path), contents(again)
            assert {name for name in said if said[name] != held[name]} == set(), i
            outcomes["loaded"] += 1
        engine.prefill(engine.tokenize("It goes on."))
        assert engine.report().kv.used_bytes > 0
    assert min(outcomes.values()) >= 5 and sum(outcomes.values()) == 50, outcomes


def test_a_header_that_lies_with_the_right_sum_is_refused(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    say(Chat(engine), STORY)
    path = tmp_path / "s"
    save(path, engine, Session())
    data = path.read_bytes()[:-32]
    start = len(MAGIC) + 8
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    header = json.loads(data[start:end])
    sizes = header["parts"]
    for lie in (
        {"evicted_at": None},
        {"evicted_at": -1},
        {"rolled": 5},
        {"parts": {"tokens": 8}},
        {"parts": {**sizes, "tokens": sizes["tokens"] - 1}},
        {"parts": {**sizes, "tokens": -4}},
        {"parts": {**sizes, "cache": 2**60}},
        {"settings": {}},
        {"session": {"messages": 5}},
        {"session": {"messages": [5]}},
        {"session": {"messages": [{"role": "user"}]}},
        {"session": {"messages": [{"role": "user", "content": 5}]}},
        {"session": None},
    ):
        text = json.dumps(header | lie).encode()
        body = MAGIC + len(text).to_bytes(8, "little") + text + data[end:]
        path.write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(KVError):
            load(path, engine)
        engine.prefill(engine.tokenize("It goes on."))


@pytest.mark.parametrize("field", ["library", "policy_args"])
def test_a_session_of_another_version_keeps_its_messages(
    field: str, open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade changes the library or the defaults of a policy, and adds fields; the conversation goes on."""
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    chat = Chat(engine)
    first = say(chat, STORY + "Who counted ships?")
    old = session_module.settings(engine)
    old[field] = {"library": "0123abc", "policy_args": {"window": 7}}[field]
    monkeypatch.setattr(session_module, "settings", lambda _engine: old)
    monkeypatch.setattr(Session, "SAVED", (*Session.SAVED, "later"))
    monkeypatch.setattr(Session, "later", "a field of another version", raising=False)
    chat.save(tmp_path / "s")
    monkeypatch.undo()
    other = Chat(open_with(open_engine, "ada-snapkv", "128", "f16"))
    other.load(tmp_path / "s")
    assert other.messages[-1]["content"] == first and other.dropped.startswith("it was saved with ")
    say(other, "And when?")
    assert other.reread


def test_saving_copies_the_cache_once_and_loading_never(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine(policy="full", budget="100%", n_ctx=4096)
    engine.prefill(engine.tokenize(STORY * 40)[:3000])
    tracemalloc.start()
    size = save(tmp_path / "s", engine, Session())
    assert tracemalloc.get_traced_memory()[1] < 1.2 * size
    tracemalloc.reset_peak()
    tracemalloc.clear_traces()
    load(tmp_path / "s", engine)
    assert tracemalloc.get_traced_memory()[1] < 0.3 * size
    tracemalloc.stop()


def test_an_interrupted_prompt_that_evicted_is_not_taken_for_a_cache(open_engine: OpenEngine) -> None:
    engine = open_with(open_engine, "ada-snapkv", "128", "f16")
    chat = Chat(engine)
    first = say(chat, STORY + "Who counted ships?")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat.ask(STORY + "And why?", 4, GREEDY, on_progress=stop))
    assert "".join(chat.again(12, GREEDY)) == first and chat.reread
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask(STORY + "And why?", 4, GREEDY, on_progress=stop))
    chat.undo()
    assert say(chat, STORY + "Who counted ships?") == first


def test_two_conversations_share_a_cache_and_know_it(open_engine: OpenEngine) -> None:
    engine = open_with(open_engine, "full", "100%", "f16")
    one, two = Chat(engine), Chat(engine)
    say(one, "My name is Ada.")
    say(two, "Name a river.")
    say(one, "What is my name?")
    assert one.reread and engine.sequences[0].tokens[: len(engine.chat_tokens(one.messages[:1])) - 8]
    alone = Chat(engine)
    engine.reset()
    alone.messages = [dict(m) for m in one.messages[:2]]
    assert say(alone, "What is my name?") == one.messages[-1]["content"]


def test_a_conversation_without_a_cache_is_saved_all_the_same(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_with(open_engine, "ladder", "128", "f16")
    chat = Chat(engine)
    say(chat, STORY + "Who counted ships?")
    for change in (lambda: chat.set_system("Be brief."), lambda: engine.change(policy=make_policy("ada-snapkv"))):
        change()
        chat.save(tmp_path / "s")
        fresh = open_with(open_engine, engine.policy.name, "128", "f16")
        other = Chat(fresh)
        other.load(tmp_path / "s")
        assert other.messages == chat.messages and not fresh.sequences[0].tokens
        say(other, "And when?")
        assert other.reread
        say(chat, "And when?")


def test_a_prompt_cache_of_another_budget_is_read_again(open_engine: OpenEngine, tmp_path: Path) -> None:
    small = open_with(open_engine, "ada-snapkv", "64", "f16")
    tokens = small.tokenize(STORY)
    assert prefill_cached(tmp_path / "p", small, tokens) == 0
    small.reset()
    assert prefill_cached(tmp_path / "p", small, tokens) == len(tokens)
    large = open_with(open_engine, "ada-snapkv", "192", "f16")
    assert prefill_cached(tmp_path / "p", large, tokens) == 0
    assert large.kv(0)["held_mean"] == 192
