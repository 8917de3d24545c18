"""What is evicted is gone, and nothing else: a model that retrieves facts loses exactly the facts that are evicted."""

from __future__ import annotations

import pytest
from needles import (
    FACTS,
    GATE,
    LANTERN,
    OTHER_SENTENCE,
    Fact,
    OpenEngine,
    answer,
    branch,
    document,
    evict_span,
    kept_per_head,
    prompt,
    span,
)

# (filler before, filler after): short and long, the fact early, in the middle and late
PLACES = [(3, 8), (8, 4), (1, 20)]

each_fact = pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.value)


@pytest.mark.parametrize("policy", ["full", "streaming", "snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"])
def test_everything_kept_answers_right(policy: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, "100%")
    for fact in FACTS:
        engine.reset()
        engine.prefill(prompt(engine, document(fact), fact.question))
        assert answer(engine) == fact.sentence
        assert engine.finish_reason == "stop"


@each_fact
def test_an_evicted_sentence_is_gone_and_its_neighbours_stay(fact: Fact, open_engine: OpenEngine) -> None:
    """The document is read once; branches of it lose the needle, its value alone, another sentence, or nothing.

    The question is read after the eviction: its own keys and values must not carry what it saw before.
    """
    engine = open_engine(n_seq_max=4, n_ctx=2048)
    assert engine.cache is not None
    for before, after in PLACES:
        engine.reset()
        tokens = prompt(engine, document(fact, before=before, after=after), fact.question)
        start, stop = span(engine, tokens, fact.sentence)
        value = span(engine, tokens, f" {fact.value}.")
        other = span(engine, tokens, OTHER_SENTENCE)[0]
        end = span(engine, tokens, fact.question)[0]
        assert start <= value[0] < value[1] <= stop < end

        engine.prefill(tokens[:end])
        for seq, gone in ((1, (start, stop)), (2, value), (3, (other, other + stop - start))):
            branch(engine, 0, seq)
            evict_span(engine, *gone, seq=seq)
            assert all(len(held) == end - (gone[1] - gone[0]) for held in kept_per_head(engine, seq))
        answers = []
        for seq in range(4):
            engine.prefill(tokens[end:], sequence=engine.sequences[seq])
            answers.append(answer(engine, seq=seq))
        everything, no_needle, no_value, no_other = answers
        assert everything == fact.sentence
        assert fact.value not in no_needle
        assert fact.value not in no_value
        assert no_other == everything


def test_a_needle_evicted_after_the_question_was_read_is_gone_too(open_engine: OpenEngine) -> None:
    """The last token is computed again: the logits of the prompt's end still saw the needle."""
    engine = open_engine()
    for fact in FACTS:
        engine.reset()
        tokens = prompt(engine, document(fact), fact.question)
        engine.prefill(tokens)
        evict_span(engine, *span(engine, tokens, fact.sentence))
        engine.context.truncate(0, len(tokens) - 1)
        engine.context.decode(tokens[-1:], len(tokens) - 1, 0)
        assert fact.value not in answer(engine)


def test_recent_tokens_alone_lose_what_scores_find(open_engine: OpenEngine) -> None:
    """A needle at a depth of 0.3. The wide kernel: the tiny model's window looks at the beginning of a fact, and
    pooling has to reach its end."""
    wide = {"kernel": 15}
    losing = open_engine("streaming", "25%")
    finding = [open_engine(policy, "40%", wide) for policy in ("snapkv", "ada-snapkv", "pyramidkv", "ada-pyramid")]
    for fact in FACTS[::2]:
        for engine in (losing, *finding):
            engine.reset()
            tokens = prompt(engine, document(fact), fact.question)
            depth = span(engine, tokens, fact.sentence)[0] / len(tokens)
            assert 0.25 < depth < 0.35
            engine.prefill(tokens)
            assert engine.report().tokens.held_mean == engine.budget_tokens() < 0.41 * len(tokens)
            if engine is losing:
                assert fact.value not in answer(engine)
            else:
                assert answer(engine) == fact.sentence


def test_branches_forget_different_things_and_their_source_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine(n_seq_max=4, n_ctx=2048)
    text = document(LANTERN, GATE)
    tokens = {fact: prompt(engine, text, fact.question) for fact in (LANTERN, GATE)}
    end = span(engine, tokens[LANTERN], LANTERN.question)[0]
    assert tokens[LANTERN][:end] == tokens[GATE][:end]
    engine.prefill(tokens[LANTERN][:end])

    def ask(seq: int, fact: Fact) -> str:
        """On a branch that is thrown away, so that the next question finds the sequence as it was."""
        branch(engine, seq, 3)
        engine.prefill(tokens[fact][end:], sequence=engine.sequences[3])
        return answer(engine, seq=3)

    for seq, forgotten in ((1, LANTERN), (2, GATE)):
        branch(engine, 0, seq)
        evict_span(engine, *span(engine, tokens[LANTERN], forgotten.sentence), seq=seq)
    assert LANTERN.value not in ask(1, LANTERN)
    assert ask(1, GATE) == GATE.sentence
    assert ask(2, LANTERN) == LANTERN.sentence
    assert GATE.value not in ask(2, GATE)
    assert ask(0, LANTERN) == LANTERN.sentence
    assert ask(0, GATE) == GATE.sentence
