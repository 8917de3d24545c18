"""Tiny models and contexts for tests of the native code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinygguf
from contexts import OpenContext, OpenModel

from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def open_model(model_dir: Path) -> Iterator[OpenModel]:
    """``open_model(arch, **spec)``: a random model, written and loaded once per session."""
    models: dict[tuple[Any, ...], Model] = {}

    def get(arch: str = "llama", **spec: Any) -> Model:
        key = (arch, *sorted(spec.items()))
        if key not in models:
            path = model_dir / f"{len(models)}.gguf"
            tinygguf.write_model(path, arch, **spec)
            models[key] = Model(path)
        return models[key]

    yield get
    for model in models.values():
        model.close()


@pytest.fixture
def open_context() -> Iterator[OpenContext]:
    """``open_context(model, **ContextConfig fields)``; closed at the end of the test."""
    contexts: list[Context] = []

    def get(model: Model, **config: Any) -> Context:
        contexts.append(Context(model, ContextConfig(**({"n_ctx": 1024, "n_threads": 1} | config))))
        return contexts[-1]

    yield get
    for context in contexts:
        context.close()
