"""Conversations on an accelerator: through kvlocal.load, with an eviction, saved and gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from devices import chosen
from needles import FACTS, FILLER, GATE, LANTERN, MILL, document

import kvlocal
from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "kvlocal-tiny-q8_0.gguf"
THERE = [3, chosen.n_gpu_layers]
"""Some layers, and all."""


def load(n_gpu_layers: int, policy: str = "ada-snapkv", budget: str = "50%") -> kvlocal.LLM:
    return kvlocal.load(
        TINY, policy=policy, budget=budget, n_ctx=1024, n_ubatch=256, n_threads=1, n_gpu_layers=n_gpu_layers
    )


@pytest.mark.parametrize("n_there", THERE)
@pytest.mark.parametrize("policy", ["full", "snapkv", "ada-snapkv", "streaming"])
def test_answers_are_those_of_the_cpu(n_there: int, policy: str) -> None:
    """To the letter: the model is sure of what it says."""
    text, answers = document(LANTERN, before=1, after=2), []
    for n in (0, n_there):
        with load(n, policy, "100%" if policy == "full" else "75%") as llm:
            answers.append(llm.generate(f"{text}\n{LANTERN.question}", n_predict=24, temp=0))
    assert answers[1] == answers[0]
    assert LANTERN.value in answers[1] or policy in ("snapkv", "ada-snapkv")


@pytest.mark.parametrize("n_there", THERE)
def test_a_conversation_goes_on_from_where_it_was_saved(n_there: int, tmp_path: Path) -> None:
    with load(n_there) as llm:
        chat = llm.chat()
        first = chat.ask(f"{document(GATE, MILL, before=1, after=2)}\n{GATE.question}", n_predict=24, temp=0)
        held = llm.kv.kv.used_bytes
        assert chat.save(tmp_path / "saved") > 0
        went_on = chat.ask(MILL.question, n_predict=24, temp=0)
    assert GATE.value in first
    with load(n_there) as llm:
        again = llm.chat()
        again.load(tmp_path / "saved")
        assert llm.kv.kv.used_bytes == held
        assert again.ask(MILL.question, n_predict=24, temp=0) == went_on
        assert not again.reread
        assert again.undo() == MILL.question


def test_many_tokens_with_evictions_stay_close_to_the_cpu() -> None:
    """Policies that evict as the answer grows, for 150 tokens: the logits follow the CPU's along the same text."""
    text = FILLER * 6 + FACTS[0].sentence
    rows = []
    for n_there in (0, chosen.n_gpu_layers):
        config = EngineConfig(
            TINY, make_policy("streaming"), Budget.parse("96"), n_ctx=512, n_threads=1, n_gpu_layers=n_there
        )
        with Engine(config) as engine:
            tokens = engine.tokenize(text)
            engine.prefill(tokens)
            if not rows:
                forced = list(engine.tokenize("".join(engine.generate(150, Sampling(temp=0, ignore_eos=True)))))
                engine.reset()
                engine.prefill(tokens)
            logits = []
            for i, token in enumerate(forced[:150]):
                engine.extend([*tokens, *forced[: i + 1]])
                assert token >= 0
                logits.append(engine.context.logits()[0])
            rows.append(np.array(logits))
    a, b = (np.exp(x - x.max(-1, keepdims=True).astype(np.float64)) for x in rows)
    a, b = (x / x.sum(-1, keepdims=True) for x in (a, b))
    assert float((a * np.log(a / b)).sum(-1).mean()) < 1e-3
