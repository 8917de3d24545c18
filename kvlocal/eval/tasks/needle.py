"""Needle in a haystack: a fact in a long generated text, and a question that only this fact answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case, Question

Kind = Literal["words", "numbers"]
Mode = Literal["single", "multi-key", "multi-turn"]
CountTokens = Callable[[str], int]

TOLERANCE = 0.02
"""Largest relative difference between a document's length and the one asked for."""

TURN_SPAN = 0.5
"""Over how much of the text the facts of a multi-turn case are spread, from the first to the last."""

_HEADER = "This is a long report about everyday life in a village, and some of its sentences are worth remembering."
_N_ANSWER = 32
_PARAGRAPH = 8  # sentences
# how the document's length is approached
_STRIDES, _SAMPLE, _TRIES = 8, 16, 400


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


# Things that facts are about. None of them, no digit and no name below occurs in the filler.
THINGS = _listed(
    "lantern, tower, kettle, mill, garden, cellar, violin, compass, harbour, chapel, stable, bakery, telescope, "
    "carriage, fountain, library, tavern, workshop, balcony, cupboard, mirror, saddle, parcel, statue, vineyard, "
    "lighthouse, piano, sledge, tent, aquarium"
)
NAMES = tuple(
    first + last
    for first in _listed("Bel, Tor, Mar, Osk, Var, Dren, Yul, Kes, Pol, Zan, Hob, Lum, Fen, Quin, Rusk, Jor")
    for last in _listed("ka, vin, essa, ulo, mira, dano, hild, oska, tev, irra, unzo, elko")
)

FILLER = {
    "adj": _listed(
        "small, grey, quiet, narrow, heavy, wet, bright, crooked, dusty, pale, cold, steep, round, broken, hollow, "
        "plain, sturdy, faded, smooth, dark"
    ),
    "thing": _listed(
        "boat, bridge, fence, barrel, chimney, ladder, cart, wall, roof, basket, bench, hedge, wheel, drum, plough, "
        "stove, sail, rope, blanket, table"
    ),
    "role": _listed(
        "shepherd, carpenter, teacher, tailor, sailor, cook, doctor, weaver, mason, potter, farmer, porter, guard, "
        "painter, smith, nurse, clerk, miner, hunter, visitor"
    ),
    "did": _listed(
        "waited, rested, laughed, coughed, stood still, fell asleep, walked on, turned back, listened, whistled, sang, "
        "hummed, shivered, smiled, worked"
    ),
    "used": _listed(
        "carried, repaired, painted, noticed, moved, cleaned, measured, admired, sold, found, covered, described, "
        "borrowed, lifted"
    ),
    "place": _listed(
        "near the river, behind the school, on the hill, at the market, beside the road, under the trees, "
        "along the shore, in the valley, by the station, outside the village, above the lake, between the fields, "
        "at the edge of the forest, across the square"
    ),
    "time": _listed(
        "in the morning, late in the evening, before noon, after the storm, all winter, that summer, "
        "on the second day, at first light, during the harvest, for a while, just after sunset, in early spring, "
        "that week, once more"
    ),
    "weather": _listed(
        "rain fell, snow lay, fog drifted, the wind turned, the sun came out, clouds gathered, the air was still, "
        "thunder rolled, frost set in, dust rose"
    ),
    "how": _listed(
        "without a word, with great care, in a hurry, for no clear reason, as usual, to the surprise of all, "
        "very slowly, like everyone else"
    ),
}
"""Words for the placeholders of a template; ``role2`` and ``adj2`` draw from the same lists."""

TEMPLATES = (
    "the {thing} was {adj}",
    "{weather} {place}",
    "the {role} {did}",
    "{time}, {weather} {place}",
    "the {role} {used} the {adj} {thing} {place}",
    "{time}, the {adj} {thing} stood {place}",
    "nobody {used} the {thing} {time}",
    "a {role} and a {role2} {did} {place} {how}",
    "{weather}, but the {role} {did} {how}",
    "they {used} one {adj} {thing} and left it {place}",
    "there was a {adj} {thing} {place}, and the {role} {used} it {time}",
    "{how}, the {role} {used} a {adj2} {thing} that looked {adj}",
)


@dataclass(frozen=True)
class Fact:
    """A sentence of the document, and the question that it answers.

    Attributes:
        value: what only this sentence says.
        depth: where it stands, from 0 (before all filler) to 1 (after it).
    """

    sentence: str
    question: str
    value: str
    depth: float


def needle_cases(
    count_tokens: CountTokens,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    kind: Kind,
    mode: Mode,
    n_keys: int = 4,
    n_turns: int = 3,
    repeats: int = 1,
    seed: int = 0,
) -> list[Case]:
    """``repeats`` documents for each length and depth; scored by :func:`kvlocal.eval.scores.contains`.

    After Kamradt, *Needle In A Haystack*, 2023, with generated filler in place of essays: no sentence occurs twice in
    a document, and none could answer the question.

    ``single`` has one fact and one question. ``multi-key`` has ``n_keys`` facts of the same kind about different
    things, spread evenly, and asks for one: the one at the depth. ``multi-turn`` has ``n_turns`` facts, and asks for
    one after the other, in an order of its own: they lie evenly in a half of the text, which moves from the first
    half (depth 0) to the second (depth 1). The label ``depth`` is that of the fact asked for; in ``multi-turn`` it is
    their mean, so from 0.25 to 0.75.

    A document depends on the seed, on its own length, depth, kind, mode and number, and on ``count_tokens``: more
    lengths or depths leave it as it is.

    Args:
        count_tokens: length of a text.
        lengths: of the documents, in tokens, met within 2 %.
        depths: share of the filler before the fact, 0 to 1; the fact stands at the nearest end of a sentence.
        kind: of the values, ``words`` (invented names) or ``numbers`` (five digits).

    Raises:
        UsageError: an argument out of range, or a length that the facts do not fit in.
    """
    _check(lengths, depths, kind, mode, n_keys, n_turns, repeats)
    cases = []
    for length in dict.fromkeys(lengths):
        for depth in dict.fromkeys(depths):
            for repeat in range(repeats):
                name = f"needle-{mode}-{kind}/{length}-{depth:g}-{repeat}"
                rng = random.Random(f"{seed} {name}")
                where = _depths(rng, mode, depth, n_keys, n_turns)
                facts = _facts(rng, kind, where)
                asked = facts[:1] if mode != "multi-turn" else rng.sample(facts, n_turns)
                labels = {
                    "depth": round(sum(fact.depth for fact in asked) / len(asked), 4),
                    "length": length,
                    "kind": kind,
                    "mode": mode,
                }
                questions = tuple(Question(fact.question, (fact.value,), _N_ANSWER) for fact in asked)
                document = _document(rng, facts, length, count_tokens)
                cases.append(Case(name, f"needle-{mode}-{kind}", document, questions, labels))
    return cases


def _check(
    lengths: Sequence[int],
    depths: Sequence[float],
    kind: str,
    mode: str,
    n_keys: int,
    n_turns: int,
    repeats: int,
) -> None:
    for name, value, allowed in (("kind", kind, get_args(Kind)), ("mode", mode, get_args(Mode))):
        if value not in allowed:
            raise UsageError(f"{name} is {value!r}; give one of {', '.join(allowed)}.")
    for length in lengths:
        if length < 1:
            raise UsageError(f"A length is {length}; give a number of tokens of at least 1.")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"A depth is {depth:g}; give numbers from 0 (beginning) to 1 (end).")
    for name, number in (("n_keys", n_keys), ("n_turns", n_turns)):
        if not 1 <= number <= len(THINGS):
            raise UsageError(f"{name} is {number}; give a whole number from 1 to {len(THINGS)}.")
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}; give a whole number of at least 1.")


def _depths(rng: random.Random, mode: Mode, depth: float, n_keys: int, n_turns: int) -> list[float]:
    """Where the facts go; the one at ``depth`` first, so that it gets its place before the others."""
    if mode == "single":
        return [depth]
    if mode == "multi-key":
        # one in each of n_keys - 1 equal parts, anywhere in it
        return [depth] + [(i + rng.random()) / (n_keys - 1) for i in range(n_keys - 1)]
    start = depth * (1 - TURN_SPAN)
    return [start + TURN_SPAN * (i / (n_turns - 1) if n_turns > 1 else 0.5) for i in range(n_turns)]


def _facts(rng: random.Random, kind: Kind, depths: Sequence[float]) -> list[Fact]:
    things = rng.sample(THINGS, len(depths))
    if kind == "numbers":
        values = [str(number) for number in rng.sample(range(10_000, 100_000), len(depths))]
        what, ask = "code", "What is"
    else:
        values = rng.sample(NAMES, len(depths))
        what, ask = "owner", "Who is"
    return [
        # what is wanted comes first: the question's own words are what the answer goes on from
        Fact(
            f"The {what} of the {thing} is {value}.",
            f"Give a short answer.\n{ask} the {what} of the {thing}?",
            value,
            depth,
        )
        for thing, value, depth in zip(things, values, depths, strict=True)
    ]


def _document(rng: random.Random, facts: Sequence[Fact], length: int, count_tokens: CountTokens) -> str:
    """Filler, as much as it takes, with the facts in it."""
    sentences = _sentences(rng)
    filler = [next(sentences) for _ in facts]  # at the least, so that no two facts stand side by side

    def missing(filler: Sequence[str]) -> int:
        return length - count_tokens(_assemble(filler, facts))

    # in strides that fall somewhat short, then sentence by sentence
    gap = missing(filler)
    for _ in range(_STRIDES):
        sample = [next(sentences) for _ in range(_SAMPLE)]
        n = int(0.9 * gap * _SAMPLE / max(2 * _SAMPLE, count_tokens(" ".join(sample))))
        if n < 1:
            break
        filler += sample[:n] + [next(sentences) for _ in range(n - _SAMPLE)]
        gap = missing(filler)
    for _ in range(_TRIES):
        if abs(gap) <= TOLERANCE / 2 * length:  # better than promised, since it costs little
            break
        others = [[*filler, next(sentences)], [*filler[:-1], next(sentences)], filler[:-1]]
        for other in others[: 3 if len(filler) > len(facts) else 2]:
            if abs(new := missing(other)) < abs(gap):
                filler, gap = other, new
    if abs(gap) > TOLERANCE * length:
        raise UsageError(
            f"A document with {len(facts)} fact{'s' * (len(facts) != 1)} cannot be made {length} tokens long within "
            f"{TOLERANCE:.0%} (the nearest has {length - gap}); give a greater length."
        )
    return _assemble(filler, facts)


def _assemble(filler: Sequence[str], facts: Sequence[Fact]) -> str:
    """The document: a sentence that says what it is, then filler and facts in paragraphs."""
    ends = [0, *accumulate(len(sentence) + 1 for sentence in filler)]
    places: dict[int, str] = {}
    for fact in facts:
        free = (place for place in range(len(ends)) if place not in places)
        places[min(free, key=lambda place: abs(ends[place] - fact.depth * ends[-1]))] = fact.sentence
    body: list[str] = []
    for i in range(len(ends)):
        body += [places[i]] if i in places else []
        body += filler[i : i + 1]
    paragraphs = (" ".join(body[i : i + _PARAGRAPH]) for i in range(0, len(body), _PARAGRAPH))
    return f"{_HEADER}\n\n" + "\n".join(paragraphs) + "\n\n"


def _sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of filler, no two alike, without end."""
    seen: set[str] = set()
    while True:
        words = {name: rng.choice(words) for name, words in FILLER.items()}
        words["role2"] = rng.choice([word for word in FILLER["role"] if word != words["role"]])
        words["adj2"] = rng.choice([word for word in FILLER["adj"] if word != words["adj"]])
        text = rng.choice(TEMPLATES).format(**words) + "."
        if text not in seen:
            seen.add(text)
            yield text[0].upper() + text[1:]
