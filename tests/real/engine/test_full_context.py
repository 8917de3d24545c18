"""A budget that is larger than the context: what was kept makes room, and the answer goes on to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from needles import FILLER, OpenEngine

from kvlocal.engine.engine import Engine
from kvlocal.native.sampling import Sampling

LONG = Sampling(temp=0, ignore_eos=True)


@pytest.fixture
def room(open_engine: OpenEngine) -> Callable[..., Engine]:
    def get(policy: str, budget: str, **config: Any) -> Engine:
        return open_engine(policy, budget, **({"n_ctx": 256} | config))

    return get


@pytest.mark.parametrize(
    "budget, config",
    [
        ("2048", {}),
        ("2048", {"n_ctx": 512}),
        ("250", {}),
        ("1MiB", {}),
        ("50%", {}),
        ("99%", {}),
        ("2048", {"evict_every": 1}),
        ("2048", {"evict_every": 100}),
        ("900", {"n_ctx": 1024, "prefill": "chunked", "chunk": 64}),
    ],
)
def test_an_answer_longer_than_the_context(budget: str, config: dict[str, Any], room: Callable[..., Engine]) -> None:
    engine = room("ladder", budget, **config)
    engine.prefill(engine.tokenize(FILLER))
    n = engine.n_ctx + 300
    pieces = list(engine.generate(n, LONG))
    report = engine.report()
    assert report.finish_reason == "length" and report.tokens.generated == n, "".join(pieces)[-80:]
    assert report.kv.used_bytes <= engine.n_ctx * report.kv.full_bytes // len(engine.sequences[0].tokens)


@pytest.mark.parametrize("args", [{"rungs": "f16"}, {"rungs": "f16,kv2"}, {"price": "layer"}, {"alpha": 1.0}])
def test_whatever_the_rungs(args: dict[str, object], open_engine: OpenEngine) -> None:
    engine = open_engine("ladder", "2048", args, n_ctx=256)
    engine.prefill(engine.tokenize(FILLER))
    list(engine.generate(500, LONG))
    assert engine.report().tokens.generated == 500


def test_a_prompt_that_fills_the_context_is_answered(room: Callable[..., Engine]) -> None:
    for every in (1, 32, 200):
        engine = room("ladder", "2048", evict_every=every)
        tokens = engine.tokenize(FILLER * 20)[:255]
        engine.prefill(tokens)
        list(engine.generate(300, LONG))
        assert engine.report().tokens.generated == 300


def test_a_chat_goes_on_past_the_context(room: Callable[..., Engine]) -> None:
    engine = room("ladder", "2048")
    engine.prefill(engine.tokenize(FILLER * 2))
    for _ in range(6):
        engine.prefill(engine.tokenize(FILLER * 2, add_special=False))
        list(engine.generate(40, LONG))
    assert engine.report().tokens.generated == 240
