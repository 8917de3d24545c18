"""A chat about a long document: every turn asks for one of its facts, of which the first turns know nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from kvlocal.engine.chat import Chat
from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.archive import Archive
from kvlocal.storage.budget import Budget

FILLER = (
    "The wind moved slowly over the quiet hills.",
    "A small boat waited by the old bridge.",
    "Nobody spoke in the long hall that evening.",
    "The baker opened his window before the sun rose.",
)
THINGS = ("lantern", "tower", "kettle", "gate", "boat", "coat", "mill", "garden", "lamp", "bell")
KINDS = ("code", "price", "number")
TURNS = len(THINGS) * len(KINDS)


def _document(n_sentences: int, seed: int) -> tuple[str, dict[str, str]]:
    """A text with facts in its first two thirds, and what each of them is asked for with its answer."""
    rng = random.Random(seed)
    facts = {f"{kind} of the {thing}": str(rng.randrange(100, 1000)) for kind in KINDS for thing in THINGS}
    out = [rng.choice(FILLER) for _ in range(n_sentences)]
    places = sorted(rng.sample(range(n_sentences * 2 // 3), len(facts)))
    for place, (what, value) in reversed(list(zip(places, facts.items(), strict=True))):
        out.insert(place, f"The {what} is {value}.")
    return " ".join(out), facts


def measure(model: Path, n_sentences: int = 100) -> list[dict[str, Any]]:
    """Rows: what was kept, tokens of the document and of the whole chat, answers with the right code of all."""
    kinds: list[tuple[str, str, Archive | None]] = [("full", "100%", None)]
    for policy, budget in (
        ("ladder", "12.5%"),
        ("ladder", "6%"),
        ("ada-snapkv", "6%"),
        ("streaming", "6%"),
        ("streaming", "3%"),
    ):
        kinds += [(policy, budget, archive) for archive in (None, Archive(budget=64))]
    return [_chat(model, policy, budget, archive, n_sentences) for policy, budget, archive in kinds]


def _chat(model: Path, policy: str, budget: str, archive: Archive | None, n_sentences: int) -> dict[str, Any]:
    text, facts = _document(n_sentences, seed=n_sentences)
    order = random.Random(1).sample(sorted(facts), TURNS)
    config = EngineConfig(model, make_policy(policy), Budget.parse(budget), n_ctx=8192, n_threads=1, archive=archive)
    with Engine(config) as engine:
        chat, sampling, n_right, n_document = Chat(engine), Sampling(temp=0), 0, 0
        for i, what in enumerate(order):
            question = f"What is the {what}?"
            answer = "".join(chat.ask(f"{text}\n\n{question}" if i == 0 else question, 24, sampling))
            n_document = n_document or len(engine.sequences[0].tokens)
            n_right += facts[what] in answer
        report = engine.report()
        return {
            "policy": policy,
            "budget": budget,
            "recalls": f"{archive.budget} turn" if archive else "",
            "n_document": n_document,
            "n_tokens": len(engine.sequences[0].tokens),
            "used_bytes": report.kv.used_bytes,
            "full_bytes": report.kv.full_bytes,
            "archive_bytes": report.archive.bytes if report.archive else 0,
            "right": n_right,
            "turns": TURNS,
        }
