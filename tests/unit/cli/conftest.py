"""The command without a model: a stand-in for a function has to be callable as the function is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
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
