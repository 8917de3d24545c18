"""The stand-ins of the tests take what the real classes take and have nothing that these lack."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import fake_bench
import fake_engine
import pytest
from kvlocal_cli.options.settings import Settings
from signatures import disagreement, disagreements

from kvlocal.batch.batch import Batch
from kvlocal.engine.chat import Chat
from kvlocal.engine.engine import Engine
from kvlocal.engine.report import Report
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.model import Model


def from_test(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """A class of a test file of the commands."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "cli")
    found: type = getattr(importlib.import_module(module), name)
    return found


# what only tests use
OF_ENGINE = {"settings", "words", "fault", "fault_at", "prefill_fault", "changes", "raw", "messages", "sampling"}
OF_ENGINE |= {"text", "n_predict", "closed", "generated", "alter", "note"}
OF_CONTEXT = {"world", "lane", "slots", "demoted", "peak", "closed", "allocated", "evict", "note"}
PAIRS: dict[str, tuple[type, type, set[str]]] = {
    "engine": (fake_engine.FakeEngine, Engine, OF_ENGINE),
    "chat": (fake_engine.FakeChat, Chat, {"forgotten"}),
    "report": (fake_engine.FakeReport, Report, {"values"}),
    "bench model": (fake_bench.FakeModel, Model, {"checked"}),
    "bench context": (fake_bench.FakeContext, Context, OF_CONTEXT),
    "bench cache": (fake_bench.FakeCache, PagedCache, {"context"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_fake_is_like_the_real_one(pair: str) -> None:
    fake, real, own = PAIRS[pair]
    assert disagreements(fake, real, own) == []


def test_the_fake_batch_is_like_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = from_test(monkeypatch, "test_cli_batch", "FakeBatch")
    assert disagreements(fake, Batch, {"arguments", "fault", "ran"}) == []


def real(a: int, b: int = 2, *, c: int = 3) -> None: ...


def other_default(a: int, b: int = 3) -> None: ...


def other_kind(a: int, *, b: int = 2) -> None: ...


def too_few() -> None: ...


def other_order(b: int, a: int) -> None: ...


def unknown(a: int, d: int = 2) -> None: ...


@pytest.mark.parametrize("fake", [other_default, other_kind, too_few, other_order, unknown])
def test_other_arguments_are_seen(fake: Any) -> None:
    assert disagreement(fake, real)


@pytest.mark.parametrize("fake", [real, lambda a: None, lambda _a, b: None, lambda *a, **b: None])
def test_fewer_optional_arguments_are_none_of_that(fake: Any) -> None:
    assert disagreement(fake, real) == ""


def test_an_attribute_that_is_gone_is_seen() -> None:
    class Real:
        kept: int = 1

        def __init__(self) -> None:
            self.set_here = 2

        def call(self, n: int) -> None: ...

    class Fake:
        kept, set_here, gone = 1, 2, 3

        def call(self) -> None: ...

    assert disagreements(Fake, Real, set()) == ["gone: not there", "call: it needs 'n'"]


def keys(values: dict[str, Any]) -> dict[str, Any]:
    """The names of nested dictionaries, without what they hold."""
    return {name: keys(value) if isinstance(value, dict) else None for name, value in values.items()}


def test_the_fake_report_has_the_fields_of_the_real_one() -> None:
    real = Report().as_dict()
    assert keys(fake_engine.FakeEngine(Settings()).report().as_dict()) == keys(real)
