"""Documents with one fact in them for the tiny model, and the few steps that tests of eviction take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvlocal.engine.engine import Engine
from kvlocal.native.sampling import Sampling

OpenEngine = Callable[..., Engine]

GREEDY = Sampling(temp=0)
FILLER = (
    "The wind moved slowly over the quiet hills. A small boat waited by the old bridge. "
    "Nobody spoke in the long hall that evening. "
)
OTHER_SENTENCE = "A small boat waited by the old bridge."


@dataclass(frozen=True)
class Fact:
    """A sentence, the question it answers, and the word that only it knows. The answer repeats the sentence."""

    sentence: str
    question: str

    @property
    def value(self) -> str:
        return self.sentence.rstrip(".").split()[-1]


# the tiny model answers each of them to the letter when everything is kept
FACTS = (
    Fact("The code of the lantern is 48213.", "What is the code of the lantern?"),
    Fact("The code of the tower is 90175.", "What is the code of the tower?"),
    Fact("The code of the kettle is 60482.", "What is the code of the kettle?"),
    Fact("The colour of the gate is green.", "What is the colour of the gate?"),
    Fact("The colour of the boat is red.", "What is the colour of the boat?"),
    Fact("The colour of the coat is yellow.", "What is the colour of the coat?"),
    Fact("The owner of the mill is Tarvo.", "Who is the owner of the mill?"),
    Fact("The owner of the garden is Belka.", "Who is the owner of the garden?"),
    Fact("The price of the lamp is 730.", "What is the price of the lamp?"),
    Fact("The price of the bell is 915.", "What is the price of the bell?"),
    Fact("The number of the house is 57.", "What is the number of the house?"),
    Fact("Mara lives in Oslen.", "Where does Mara live?"),
    Fact("Tomas lives in Varno.", "Where does Tomas live?"),
)
LANTERN, GATE, MILL = FACTS[0], FACTS[3], FACTS[6]


def document(*facts: Fact, before: int = 3, after: int = 8) -> str:
    """Filler, the facts with filler between them, filler; with the defaults the first fact is at a depth of 0.27."""
    middle = (FILLER * 2).join(fact.sentence + " " for fact in facts)
    return FILLER * before + middle + FILLER * after


def prompt(engine: Engine, text: str, question: str) -> list[int]:
    return engine.chat_tokens([{"role": "user", "content": f"{text}\n\n{question}"}])


def span(engine: Engine, tokens: Sequence[int], text: str) -> tuple[int, int]:
    """Positions ``[start, stop)`` of the tokens that spell the first occurrence of ``text``."""
    starts, spelled = [], b""
    for token in tokens:
        starts.append(len(spelled))
        spelled += engine.model.piece(token)
    begin = spelled.index(text.encode())
    # a token that begins inside the text and one that only reaches into it both belong to it
    first = bisect_left(starts, begin + 1) - 1
    return first, bisect_left(starts, begin + len(text))


def answer(engine: Engine, n_predict: int = 24, *, seq: int = 0) -> str:
    return "".join(engine.generate(n_predict, GREEDY, sequence=engine.sequences[seq]))


def branch(engine: Engine, src: int, dst: int) -> None:
    """Make one sequence a copy of another."""
    engine.sequences[src].branch(engine.sequences[dst])


def evict_span(engine: Engine, start: int, stop: int, *, seq: int = 0) -> None:
    """Drop the slots of these positions from every head of every layer."""
    assert engine.cache is not None
    for layer in range(len(engine.cache.layers)):
        heads = engine.cache.positions(seq, layer)
        engine.cache.keep(seq, layer, [np.flatnonzero((p < start) | (p >= stop)) for p in heads])


def first_token(engine: Engine) -> int:
    """What greedy decoding takes next."""
    return int(engine.context.logits()[0].argmax())


def kept_per_head(engine: Engine, seq: int = 0) -> list[np.ndarray]:
    """Positions held, one array per layer and head."""
    assert engine.cache is not None
    return [head for layer in range(len(engine.cache.layers)) for head in engine.cache.positions(seq, layer)]
