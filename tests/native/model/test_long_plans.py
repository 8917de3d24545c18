"""Plans of prompts too long to be rehearsed whole: two shorter ones tell what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinygguf

from kvlocal.engine.config import EngineConfig
from kvlocal.measure import rehearsal
from kvlocal.measure.plan import Need, Planner
from kvlocal.measure.rehearsal import Rehearsal
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

# so short that the whole prompt can be rehearsed as well
LONG, N = 1024, 5003


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "far.gguf"
    tinygguf.write_model(path, "llama", n_ctx=10_000_000)
    return path


def config(path: Path, policy: str, budget: str, kv: str = "f16", **settings: Any) -> EngineConfig:
    return EngineConfig(
        path, make_policy(policy), Budget.parse(budget), storage=Storage.parse(kv, tail=32), chunk=64, **settings
    )


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts that were played, tokens."""
    out: list[int] = []
    play = Rehearsal.play

    def note(self: Rehearsal, n_prompt: int, n_generate: int, *, to_peak: bool = False) -> None:
        out.append(n_prompt)
        play(self, n_prompt, n_generate, to_peak=to_peak)

    monkeypatch.setattr(Rehearsal, "play", note)
    return out


@pytest.mark.parametrize("to_peak", [False, True])
@pytest.mark.parametrize(
    ("policy", "budget", "kv", "prefill", "n_seq"),
    [
        ("full", "100%", "f16", "exact", 1),
        ("full", "100%", "f16", "exact", 3),
        ("full", "100%", "q4", "exact", 1),
        ("full", "100%", "kivi", "chunked", 2),
        ("ladder", "64", "f16", "exact", 1),
        ("snapkv", "64", "f16", "exact", 2),
        ("snapkv", "25%", "f16", "chunked", 1),
        ("ada-snapkv", "25%", "kv3", "exact", 1),
    ],
)
def test_a_long_prompt_takes_what_two_shorter_ones_say(
    policy: str,
    budget: str,
    kv: str,
    prefill: Any,
    n_seq: int,
    to_peak: bool,
    path: Path,
    played: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(path, policy, budget, kv, prefill=prefill, n_ctx=N + 100, n_seq_max=n_seq)

    def need(long: int) -> Need:
        monkeypatch.setattr(rehearsal, "_LONG", long)
        with Planner(path, free_bytes=1 << 40) as planner:
            return planner.need(settings, N, 16, to_peak=to_peak)

    said, whole = need(LONG), need(1 << 40)
    assert played[-1] == N and len(played) == 3 and max(played[:2]) < N
    assert all(n % 64 == N % 64 for n in played)
    assert said.kv.full_bytes == whole.kv.full_bytes
    assert said.kv.peak_bytes == pytest.approx(whole.kv.peak_bytes, rel=0.02)
    assert said.kv.used_bytes == pytest.approx(whole.kv.used_bytes, rel=0.05)
    assert said.kv.table_bytes == pytest.approx(whole.kv.table_bytes, rel=0.05)
    assert said.total_bytes == pytest.approx(whole.total_bytes, rel=0.02)


@pytest.mark.parametrize(("policy", "budget"), [("ladder", "2048"), ("full", "100%"), ("snapkv", "25%")])
def test_how_long_a_plan_takes_does_not_depend_on_the_length(
    policy: str, budget: str, path: Path, played: list[int]
) -> None:
    with Planner(path, free_bytes=1 << 40) as planner:
        n_ctx = planner.model.n_ctx_train
        assert n_ctx == 10_000_000
        planner.need(config(path, policy, budget, n_ctx=n_ctx), n_ctx - 200, 100)
        planner.need(config(path, policy, budget, n_ctx=n_ctx), n_ctx - 200, 100, to_peak=True)
    assert sum(played) < 200_000


def test_a_prompt_that_is_not_long_beside_its_budget_is_played_whole(path: Path, played: list[int]) -> None:
    with Planner(path, free_bytes=1 << 40) as planner:
        planner.need(config(path, "snapkv", "8000", n_ctx=40_000), 30_000, 10)
        planner.need(config(path, "snapkv", "64", n_ctx=40_000), 30_000, 4000, to_peak=True)
    assert played == [30_000, 30_000]
