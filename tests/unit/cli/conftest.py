"""The command without a model: a stand-in for a function has to be callable as the function is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_eval import MACHINE, FakeEval
from kvlocal_cli.backend import eval as eval_backend
from kvlocal_cli.backend import machine as backend_machine
from signatures import disagreement


class CheckedPatch(pytest.MonkeyPatch):
    """Refuses to put something in the place of a function of ours that takes other arguments."""

    def setattr(self, target: Any, name: Any, *value: Any, **rest: Any) -> None:
        real = getattr(target, name, None) if value else None
        ours = str(getattr(real, "__module__", "")).startswith("kvlocal")
        if ours and inspect.isfunction(real) and callable(value[0]):
            assert (trouble := disagreement(value[0], real)) == "", f"the stand-in for {name}: {trouble}"
        super().setattr(target, name, *value, **rest)


@pytest.fixture
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    patch = CheckedPatch()
    yield patch
    patch.undo()


@pytest.fixture
def fake_eval(monkeypatch: pytest.MonkeyPatch) -> FakeEval:
    """What `kvlocal eval` runs instead of a measurement."""
    fake = FakeEval()
    monkeypatch.setattr(backend_machine, "find_model", fake.find_model)
    monkeypatch.setattr(eval_backend, "f32_model", fake.f32_model)
    monkeypatch.setattr(eval_backend, "open_eval", fake.open_eval)
    monkeypatch.setattr(backend_machine, "describe_machine", lambda _n_threads: MACHINE)
    return fake


@pytest.fixture
def novel(tmp_path: Path) -> str:
    """The path of a short text."""
    (tmp_path / "novel.txt").write_text("It was a dark night.")
    return str(tmp_path / "novel.txt")
