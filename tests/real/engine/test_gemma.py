"""Gemma 3 270M, with a sliding window of 512 tokens in 15 of 18 layers, where `kvlocal pull gemma3-270m` has put it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skips import NO_GEMMA

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.models.default import NAMED, fetched
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

PATH = fetched(NAMED["gemma3-270m"])
pytestmark = pytest.mark.skipif(PATH is None, reason=NO_GEMMA)
N_TEXT, N_SEEN = 2048, 128  # past four windows


@pytest.fixture(scope="module")
def model() -> Model:
    assert PATH is not None
    return Model(PATH)


@pytest.fixture(scope="module")
def tokens(model: Model) -> np.ndarray:
    text = (Path(__file__).parents[3] / "demo" / "expedition-log.txt").read_text("utf-8")
    return np.array((model.tokenize(text) * 2)[:N_TEXT])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


def predictions(model: Model, tokens: np.ndarray, config: ContextConfig) -> np.ndarray:
    with Context(model, config) as context:
        for i in range(0, N_TEXT - N_SEEN, 256):
            context.decode(tokens[i : min(i + 256, N_TEXT - N_SEEN)], i, outputs="none")
        context.decode(tokens[-N_SEEN:], N_TEXT - N_SEEN, outputs="all")
        return log_softmax(context.logits(N_SEEN))


def test_it_agrees_with_llama_cpp_past_four_windows(model: Model, tokens: np.ndarray) -> None:
    stock = ContextConfig(N_TEXT, n_outputs=N_SEEN, paged=False)
    want = predictions(model, tokens, stock)
    # weights of 4 bits: llama.cpp's own ways differ from each other by as much
    other = predictions(model, tokens, ContextConfig(N_TEXT, n_outputs=N_SEEN, paged=False, flash_attn=False))
    floor = (np.exp(want) * (want - other)).sum(axis=1).mean()
    for config in (ContextConfig(N_TEXT, n_outputs=N_SEEN), ContextConfig(N_TEXT, n_outputs=N_SEEN, portable=True)):
        got = predictions(model, tokens, config)
        assert (np.exp(want) * (want - got)).sum(axis=1).mean() < 3 * floor + 0.001


def test_only_its_three_open_layers_are_evicted(tokens: np.ndarray) -> None:
    assert PATH is not None
    config = EngineConfig(PATH, make_policy("ada-snapkv"), Budget.parse("25%"), n_ctx=4096)
    with Engine(config) as engine:
        engine.prefill(tokens.tolist())
        kv = engine.report().kv
        assert engine.cache is not None and [layer.il for layer in engine.cache.layers] == [5, 11, 17]
        assert kv.full_bytes - kv.fixed_bytes == pytest.approx(3 * 1024 * N_TEXT, rel=0.1)
        assert kv.used_bytes - kv.fixed_bytes == pytest.approx(3 * 1024 * N_TEXT / 4, rel=0.05)
