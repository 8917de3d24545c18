"""How large a context is where none was asked for: as large as memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinygguf

from kvlocal.engine import room
from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.room import STEP, context_tokens, least
from kvlocal.measure.plan import Planner
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

TRAINED = 131_072


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    tinygguf.write_model(path, "llama", n_ctx=TRAINED)
    return path


def config(path: Path, policy: str = "full", budget: str = "2048", kv: str = "f16", **settings: Any) -> EngineConfig:
    return EngineConfig(path, make_policy(policy), Budget.parse(budget), storage=Storage.parse(kv), **settings)


def chosen(monkeypatch: pytest.MonkeyPatch, settings: EngineConfig, free: int) -> tuple[int, str | None]:
    monkeypatch.setattr(room, "free_bytes", lambda _weights: free)
    model = Model(settings.model)
    try:
        return context_tokens(model, settings)
    finally:
        model.close()


def test_what_was_asked_for_is_not_questioned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, config(path, n_ctx=500_000), 1) == (500_000, None)


@pytest.mark.parametrize("free", [1 << 40, 350 << 20])
def test_all_that_the_model_was_trained_for_if_it_fits(path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    assert chosen(monkeypatch, config(path), free) == (TRAINED, None)


@pytest.mark.parametrize(
    ("policy", "budget", "kv", "n_seq"),
    [("full", "100%", "f16", 1), ("full", "100%", "q4", 1), ("ladder", "2048", "f16", 1), ("snapkv", "25%", "q4", 2)],
)
def test_else_the_largest_that_fits_with_a_note(
    path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, budget: str, kv: str, n_seq: int
) -> None:
    free = 64 << 20
    settings = config(path, policy, budget, kv, n_seq_max=n_seq)
    n_ctx, note = chosen(monkeypatch, settings, free)
    assert least(settings) < n_ctx < TRAINED and n_ctx % STEP == 0
    assert note is not None and "131,072" in note and f"{n_ctx:,}" in note and "-c" in note
    # by the planner's account: it fits, and half as much again would not
    with Planner(path, free_bytes=free) as planner:

        def need(n: int) -> int:
            sized = config(path, policy, budget, kv, n_seq_max=n_seq, n_ctx=n)
            return planner.need(sized, n // n_seq - 101 if policy == "full" else n - 101, 100).total_bytes

        assert need(n_ctx) <= free < need(3 * n_ctx // 2)


def test_chunks_take_what_the_budget_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 64 << 20
    assert chosen(monkeypatch, config(path, "ladder", prefill="chunked"), free) == (TRAINED, None)
    assert chosen(monkeypatch, config(path, "snapkv", "8MiB", prefill="chunked"), free) == (TRAINED, None)
    exact, _ = chosen(monkeypatch, config(path, "ladder", "50%"), free)
    half, _ = chosen(monkeypatch, config(path, "ladder", "50%", prefill="chunked"), free)
    assert exact < half < TRAINED


def test_where_nothing_fits_the_least_that_the_settings_need(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_ctx, note = chosen(monkeypatch, config(path), 1 << 20)
    assert n_ctx == 4096 and note is not None
    settings = config(path, "ladder", "8000")
    n_ctx, _ = chosen(monkeypatch, settings, 1 << 20)
    assert n_ctx == least(settings) >= 8000 + settings.chunk


def test_an_engine_has_that_context_and_the_note(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _weights: 32 << 20)
    with Engine(config(path)) as engine:
        assert engine.n_ctx == engine.context.n_cells < TRAINED
        assert len(engine.notes) == 1 and "Memory" in engine.notes[0]
        assert engine.context.breakdown().context_bytes <= 32 << 20
    with Engine(config(path, n_ctx=200_000, policy="snapkv")) as engine:
        assert engine.n_ctx == 200_000
        assert len(engine.notes) == 1 and "131,072 that the model was trained for" in engine.notes[0]
    with Engine(config(path, n_ctx=1024, policy="snapkv", budget="64")) as engine:
        assert engine.notes == []


def test_copied_weights_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    info = type("Info", (), {"rss": 900, "shared": 200})
    monkeypatch.setattr(room.psutil.Process, "memory_info", lambda _self: info)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert room.free_bytes(300) == 1300
    assert room.free_bytes(5000) == 1700
