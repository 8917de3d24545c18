"""Real models: the tiny one that ships with the tests, and the default model that users get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needles import OpenEngine

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.errors import KVError
from kvlocal.models.resolve import resolve_model
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """2.8 MB, some thousand tokens per second: finds facts in a document, and only by attending to them."""
    return REPO / "tests" / "fixtures" / "kvlocal-tiny-q8_0.gguf"


@pytest.fixture(scope="session")
def default_path() -> Path:
    """The model that runs when none is named; some 100 MB, fetched on its first use."""
    try:
        return resolve_model(None)
    except KVError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def log_text() -> str:
    """The document of the demo."""
    return (REPO / "demo" / "expedition-log.txt").read_text("utf-8")


@pytest.fixture
def open_engine(tiny_path: Path) -> Iterator[OpenEngine]:
    """``open_engine(policy, budget, args, model=…, **EngineConfig fields)``; closed at the end of the test."""
    engines: list[Engine] = []

    def get(
        policy: str = "ada-snapkv",
        budget: str = "100%",
        args: dict[str, object] | None = None,
        *,
        model: Path = tiny_path,
        **config: Any,
    ) -> Engine:
        # one thread: the tiny model is no faster with two, and much slower with two on busy cores
        settings = {"n_threads": 1} | config
        engines.append(Engine(EngineConfig(model, make_policy(policy, args), Budget.parse(budget), **settings)))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()
