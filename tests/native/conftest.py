"""Tiny models and contexts for tests of the native code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import pytest
import tinygguf
from contexts import OpenContext, OpenModel
from skips import NO_KERNELS

from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What is tested of accelerators needs one; None leaves the decision to others."""
    return True if collection_path.name == "device" and devices.chosen.is_cpu else None


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def open_model(model_dir: Path) -> Iterator[OpenModel]:
    """``open_model(arch, **spec)``: a random model, written and loaded once per session, on the chosen device.

    ``n_gpu_layers``: so many of its layers there.
    """
    models: dict[tuple[Any, ...], Model] = {}

    def get(arch: str = "llama", *, n_gpu_layers: int | None = None, **spec: Any) -> Model:
        n = devices.chosen.n_gpu_layers if n_gpu_layers is None else n_gpu_layers
        key = (arch, n, *sorted(spec.items()))
        if key not in models:
            path = model_dir / f"{len(models)}.gguf"
            tinygguf.write_model(path, arch, **spec)
            models[key] = Model(path, n_gpu_layers=n)
        return models[key]

    yield get
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def has_kernels(open_model: OpenModel) -> bool:
    """Whether pages on the chosen device have kernels."""
    return devices.chosen.has_kernels(open_model("llama").path)


@pytest.fixture(autouse=True)
def _kernels_are_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_kernels") and not request.getfixturevalue("has_kernels"):
        pytest.skip(NO_KERNELS)


@pytest.fixture
def open_context(has_kernels: bool) -> Iterator[OpenContext]:
    """``open_context(model, **ContextConfig fields)``; closed at the end of the test.

    The test is skipped if the fields ask for what pages on the chosen device cannot do.
    """
    contexts: list[Context] = []

    def get(model: Model, **config: Any) -> Context:
        wanted = ContextConfig(**({"n_ctx": 1024, "n_threads": 1} | config))
        if not has_kernels and (wanted.formats or wanted.rotate or wanted.mass != "none"):
            pytest.skip(NO_KERNELS)
        contexts.append(Context(model, wanted))
        return contexts[-1]

    yield get
    for context in contexts:
        context.close()
