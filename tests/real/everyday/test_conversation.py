"""Several turns on one cache: what was read is not read again, and an interruption loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from needles import (
    FACTS,
    FILLER,
    GATE,
    GREEDY,
    LANTERN,
    MILL,
    OpenEngine,
    answer,
    branch,
    document,
    kept_per_head,
    prompt,
)

from kvlocal.engine.chat import Chat
from kvlocal.engine.engine import Engine
from kvlocal.errors import UsageError

LAMP = FACTS[8]
THREE = (LANTERN, GATE, MILL)


@contextmanager
def decoded(engine: Engine) -> Iterator[list[int]]:
    """The tokens that go through the model, in order."""
    seen: list[int] = []
    decode: Callable[..., None] = engine.context.decode

    def spy(tokens: Any, *args: Any, **kwargs: Any) -> None:
        seen.extend(int(token) for token in tokens)
        decode(tokens, *args, **kwargs)

    engine.context.decode = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        engine.context.decode = decode  # type: ignore[method-assign]


def ask(chat: Chat, text: str, n_predict: int = 40) -> str:
    return "".join(chat.ask(text, n_predict, GREEDY))


#
# extend
#


def test_extend_reads_only_what_is_new(open_engine: OpenEngine) -> None:
    engine = open_engine()
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    with decoded(engine) as seen:
        assert not engine.extend(tokens[:300])
        assert not engine.extend(tokens)
    assert seen == tokens == engine.sequences[0].tokens
    assert answer(engine) == LANTERN.sentence


def test_extend_rolls_back_to_where_the_text_changes(open_engine: OpenEngine) -> None:
    """No eviction after the common prefix: nothing is lost, nothing is read twice, and nothing of the old end stays."""
    engine = open_engine()
    text = document(LANTERN, GATE)
    first, second = (prompt(engine, text, fact.question) for fact in (LANTERN, GATE))
    common = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    engine.extend(first)
    assert answer(engine) == LANTERN.sentence
    with decoded(engine) as seen:
        assert not engine.extend(second)
    assert seen == second[common:]
    assert engine.sequences[0].tokens == second
    assert all(held.tolist() == [*range(len(second))] for held in kept_per_head(engine))
    assert answer(engine) == GATE.sentence


def test_extend_to_the_same_text_computes_its_last_token(open_engine: OpenEngine) -> None:
    """Without it there are no logits to draw the answer from."""
    engine = open_engine()
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    engine.extend(tokens)
    once = answer(engine)
    with decoded(engine) as seen:
        assert not engine.extend(tokens)
    assert seen == tokens[-1:]
    assert answer(engine) == once == LANTERN.sentence


def test_extend_reads_again_what_was_evicted(open_engine: OpenEngine) -> None:
    engine = open_engine(budget="64")
    first = prompt(engine, document(LANTERN), LANTERN.question)
    engine.extend(first)
    tail = engine.tokenize("The old bridge.", add_special=False)
    with decoded(engine) as seen:
        assert not engine.extend([*first, *tail]), "only appended: the evicted part has not changed"
        assert seen == tail
        changed = prompt(engine, document(MILL), MILL.question)
        assert engine.extend(changed)
        assert seen == [*tail, *changed]
    assert engine.sequences[0].tokens == changed
    assert engine.context.n_seen(0) == len(changed)
    assert engine.report().tokens.held_mean == 64
    fresh = open_engine(budget="64")
    fresh.prefill(changed)
    for held, anew in zip(kept_per_head(engine), kept_per_head(fresh), strict=True):
        assert held.tolist() == anew.tolist()


def test_extend_to_what_does_not_fit_changes_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine()
    tokens = prompt(engine, document(LANTERN), LANTERN.question)
    engine.extend(tokens)
    with pytest.raises(UsageError, match="5000 tokens|4900 tokens"):
        engine.extend([*tokens[:100], *[300] * 4900])
    assert engine.sequences[0].tokens == tokens
    assert engine.context.n_seen(0) == len(tokens)


def test_a_branch_goes_its_own_way(open_engine: OpenEngine) -> None:
    engine = open_engine(n_seq_max=2)
    text = document(LANTERN, GATE)
    first, second = (prompt(engine, text, fact.question) for fact in (LANTERN, GATE))
    engine.prefill(first)
    alone = engine.context.stats().used_bytes
    branch(engine, 0, 1)
    assert engine.context.stats().used_bytes == alone, "shared pages are counted once"
    assert not engine.extend(second, sequence=engine.sequences[1])
    assert answer(engine, seq=1) == GATE.sentence
    assert engine.sequences[0].tokens == first
    assert not engine.extend(first)
    assert answer(engine) == LANTERN.sentence


#
# chat
#


@pytest.mark.parametrize(
    ("policy", "budget"), [("full", "100%"), ("snapkv", "100%"), ("ada-snapkv", "2048"), ("ada-pyramid", "100%")]
)
def test_three_turns_are_read_once(policy: str, budget: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, budget)
    chat = Chat(engine)
    questions = [f"{document(*THREE)}\n\n{LANTERN.question}", GATE.question, MILL.question]
    with decoded(engine) as seen:
        answers = []
        for question in questions:
            before = len(seen)
            answers.append(ask(chat, question))
            if before:
                assert len(seen) - before < 40, "a question, an answer and the template between them"
            assert not chat.reread
        assert answers == [fact.sentence for fact in THREE]
        # every token of the conversation once, in its order; only the mark that ends the last answer is still open
        whole = engine.chat_tokens(chat.messages)
        assert seen == engine.sequences[0].tokens == whole[: len(seen)]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    assert engine.report().tokens.generated == sum(len(engine.tokenize(text, add_special=False)) for text in answers)


def test_turns_beyond_the_budget_are_not_read_again_either(open_engine: OpenEngine) -> None:
    """A turn that evicts is remembered as far as it was kept; the next one is appended to it."""
    engine = open_engine(budget="280", args={"kernel": 15})
    chat = Chat(engine)
    with decoded(engine) as seen:
        assert ask(chat, f"{document(*THREE)}\n\n{MILL.question}") == MILL.sentence
        for fact in (MILL, LAMP, MILL):
            before = len(seen)
            ask(chat, fact.question)
            assert len(seen) - before < 80
            assert not chat.reread
            assert engine.report().tokens.held_mean <= 280 + engine.config.evict_every
        assert seen == engine.sequences[0].tokens
    assert engine.context.n_seen(0) == len(engine.sequences[0].tokens)


def test_clear_forgets_all_but_the_system_message(open_engine: OpenEngine) -> None:
    engine = open_engine()
    chat = Chat(engine, "Answer the question.")
    assert ask(chat, f"{document(*THREE)}\n\n{LANTERN.question}") == LANTERN.sentence
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Answer the question."}]
    assert engine.sequences[0].tokens == [] and engine.context.stats().used_bytes == 0
    with decoded(engine) as seen:
        assert LANTERN.value not in ask(chat, LANTERN.question)
    assert seen == engine.sequences[0].tokens
    assert engine.report().tokens.prompt < 40


def test_an_interrupted_answer_stays_as_far_as_it_was_said(open_engine: OpenEngine) -> None:
    engine = open_engine()
    chat = Chat(engine)
    pieces = chat.ask(f"{document(*THREE)}\n\n{LANTERN.question}", 40, GREEDY)
    said = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert engine.finish_reason == "interrupted"
    assert engine.report().text == said
    assert LANTERN.sentence.startswith(said) and said != LANTERN.sentence
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert engine.context.n_seen(0) == len(engine.sequences[0].tokens)
    with decoded(engine) as seen:
        assert ask(chat, GATE.question) == GATE.sentence
        assert ask(chat, LANTERN.question) == LANTERN.sentence
        assert len(seen) < 80
    assert engine.sequences[0].tokens == engine.chat_tokens(chat.messages)[: len(engine.sequences[0].tokens)]


def test_an_interrupted_question_was_never_asked(open_engine: OpenEngine) -> None:
    engine = open_engine()
    chat = Chat(engine)
    ask(chat, f"{document(*THREE)}\n\n{LANTERN.question}")
    messages, tokens = list(chat.messages), list(engine.sequences[0].tokens)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat.ask(FILLER, 40, GREEDY, on_progress=stop))
    assert (chat.messages, engine.sequences[0].tokens) == (messages, tokens)
    with pytest.raises(UsageError, match=r"use a larger context \(-c \d+ or more\)"):
        list(chat.ask(FILLER * 200, 40, GREEDY))
    assert (chat.messages, engine.sequences[0].tokens) == (messages, tokens)
    assert ask(chat, GATE.question) == GATE.sentence


def test_an_interrupted_question_that_had_evicted_is_read_again(open_engine: OpenEngine) -> None:
    """What an eviction took cannot be rolled back, so the conversation is read once more with the next question."""
    engine = open_engine(budget="280", args={"kernel": 15})
    chat = Chat(engine)
    assert ask(chat, f"{document(*THREE)}\n\n{MILL.question}") == MILL.sentence
    messages = list(chat.messages)

    def stop(done: int, total: int) -> None:
        if done == total:  # after the prompt's eviction
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(chat.ask(FILLER * 8, 40, GREEDY, on_progress=stop))
    assert chat.messages == messages
    with decoded(engine) as seen:
        ask(chat, MILL.question)
    assert seen == engine.sequences[0].tokens == engine.chat_tokens(chat.messages)[: len(seen)]
    assert engine.report().tokens.held_mean <= 280 + engine.config.evict_every
