"""llama.cpp's own cache of a sliding-window model gives back what lies before the window: who needs it reads again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinygguf
from contexts import random_tokens

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.session import Session, load, save
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "gemma2.gguf"
    tinygguf.write_model(out, "gemma2", n_head=4, n_head_kv=2, head_dim=64)
    return out


def open_engine(path: Path, n_ubatch: int = 32) -> Engine:
    config = EngineConfig(path, make_policy("full"), Budget.parse("100%"), n_ctx=1024, n_threads=1, n_ubatch=n_ubatch)
    return Engine(config)


def fresh(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits of a text that is read from its beginning."""
    with open_engine(path) as engine:
        engine.prefill(tokens)
        return engine.context.logits()[0]


@pytest.mark.parametrize("common", [10, 60, 250, 390])
def test_a_saved_prompt_is_read_again_from_where_it_can(common: int, path: Path, tmp_path: Path) -> None:
    with open_engine(path) as engine:
        text = random_tokens(engine.model, 400).tolist()
        other = [*text[:common], *random_tokens(engine.model, 60, seed=1).tolist()]
        engine.prefill(text)
        save(tmp_path / "s", engine, Session())
    with open_engine(path) as engine:
        load(tmp_path / "s", engine)
        engine.extend(other)
        assert engine.sequences[0].tokens == other
        np.testing.assert_allclose(engine.context.logits()[0], fresh(path, other), atol=2e-2)


@pytest.mark.parametrize("common", [10, 250, 390])
def test_an_edit_of_a_text_that_is_there(common: int, path: Path) -> None:
    with open_engine(path) as engine:
        text = random_tokens(engine.model, 400).tolist()
        other = [*text[:common], *random_tokens(engine.model, 60, seed=1).tolist()]
        engine.prefill(text)
        engine.extend(other)
        np.testing.assert_allclose(engine.context.logits()[0], fresh(path, other), atol=2e-2)


def test_what_is_held_and_what_was_saved_reach_back_to_the_window(path: Path, tmp_path: Path) -> None:
    with open_engine(path) as engine:
        engine.prefill(random_tokens(engine.model, 400).tolist())
        assert engine.sequences[0].reach(400) == 400 and engine.sequences[0].reach(20) == 0
        save(tmp_path / "s", engine, Session())
    with open_engine(path) as engine:
        load(tmp_path / "s", engine)
        sequence = engine.sequences[0]
        assert sequence.reach(400) == 400 and sequence.reach(20) == 0
        assert not sequence.cut(20) and sequence.tokens == []
