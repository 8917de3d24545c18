"""The engine on models with windows, recurrent states and latent attention: ways back, sessions, budgets, plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anymodel import N_VOCAB, make, save_file
from arch_table import TABLE

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.session import Session, load, save
from kvlocal.errors import KVError, UsageError
from kvlocal.measure.plan import Planner
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

NAMES = ("qwen35", "lfm2", "gpt-oss", "cohere2", "deepseek2", "kimi-linear")
"""Gated delta nets, short convolutions, windows with sinks, windows alone, latent attention, and both."""
FIXED = ("qwen35", "lfm2", "gpt-oss", "cohere2", "kimi-linear")
TEXT = np.random.default_rng(0).integers(0, N_VOCAB, 1000).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    out = {}
    for name in NAMES:
        arch = next(arch for arch in TABLE if arch.id == name)
        model = make(arch, folder / "metadata.gguf")
        out[name] = save_file(model, folder / f"{name}.gguf")
        model.close()
    return out


def config(path: Path, policy: str = "snapkv", budget: str = "25%", kv: str = "f16", **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_ubatch": 64, "chunk": 64}
    return EngineConfig(
        path, make_policy(policy), Budget.parse(budget), storage=Storage.parse(kv, tail=32), **defaults | settings
    )


def fresh(path: Path, *parts: list[int], **settings: Any) -> np.ndarray:
    with Engine(config(path, **settings)) as engine:
        for part in parts:
            engine.prefill(part)
        return engine.context.logits()[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_taken_back_exactly(name: str, files: dict[str, Path]) -> None:
    with Engine(config(files[name], budget="100%")) as engine:
        sequence = engine.sequences[0]
        engine.prefill(TEXT[:200])
        question = sequence.mark()
        engine.prefill(TEXT[200:300])
        answer = sequence.mark()
        engine.prefill(TEXT[300:400])
        for mark, n in ((answer, 300), (question, 200)):
            assert sequence.back(mark) and len(sequence.tokens) == n
            assert sequence.last_logits() is not None
        engine.prefill(TEXT[500:560])
        want = fresh(files[name], TEXT[:200], TEXT[500:560], budget="100%")
        np.testing.assert_allclose(engine.context.logits()[0], want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("common", [10, 199, 290])
def test_an_edit_reads_again_what_it_must(name: str, common: int, files: dict[str, Path]) -> None:
    with Engine(config(files[name], budget="100%")) as engine:
        engine.prefill(TEXT[:200])
        engine.prefill(TEXT[200:300])  # from a mark on
        other = [*TEXT[:common], *TEXT[600:640]]
        engine.extend(other)
        assert engine.sequences[0].tokens == other
        np.testing.assert_allclose(engine.context.logits()[0], fresh(files[name], other, budget="100%"), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_is_interrupted_is_taken_back(name: str, files: dict[str, Path]) -> None:
    with Engine(config(files[name], budget="100%")) as engine:
        engine.prefill(TEXT[:200])
        reading = engine.reader.read(engine.sequences[0], TEXT[200:500])
        next(reading)
        reading.close()
        assert engine.sequences[0].tokens == TEXT[:200] and engine.context.n_seen(0) == 200
        engine.prefill(TEXT[500:560])
        want = fresh(files[name], TEXT[:200], TEXT[500:560], budget="100%")
        np.testing.assert_allclose(engine.context.logits()[0], want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_session_goes_on_where_it_stopped(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    with Engine(config(files[name])) as engine:
        engine.prefill(TEXT[:300])
        save(tmp_path / "s", engine, Session())
        engine.prefill(TEXT[300:340])
        want = engine.context.logits()[0]
    with Engine(config(files[name])) as engine:
        load(tmp_path / "s", engine)
        engine.extend(TEXT[:340])
        np.testing.assert_allclose(engine.context.logits()[0], want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("policy", "budget", "kv", "settings"),
    [
        ("ladder", "25%", "f16", {}),
        ("ada-snapkv", "64", "q8", {}),
        ("snapkv", "64", "f16", {"prefill": "chunked", "guide": 16}),
        ("h2o", "64", "f16", {}),
        ("streaming", "64", "q8", {"prefill": "chunked"}),
    ],
)
def test_policies_and_storages(
    name: str, policy: str, budget: str, kv: str, settings: dict[str, Any], files: dict[str, Path]
) -> None:
    with Engine(config(files[name], policy, budget, kv, **settings)) as engine:
        engine.prefill(TEXT[:400])
        kv_bytes = engine.report().kv
        assert engine.cache is not None
        assert kv_bytes.fixed_bytes - engine.cache.fixed_bytes <= engine.cache.fixed_bytes * 3  # and its marks
        assert (kv_bytes.fixed_bytes > 0) == (name in FIXED)
        assert kv_bytes.used_bytes - kv_bytes.fixed_bytes < 0.5 * (kv_bytes.full_bytes - engine.cache.fixed_bytes)
        engine.prefill(TEXT[400:420])
        assert np.isfinite(engine.context.logits()).all()


@pytest.mark.parametrize("name", FIXED)
def test_a_budget_in_bytes_is_for_the_whole_cache(name: str, files: dict[str, Path]) -> None:
    with Engine(config(files[name])) as engine:
        assert engine.cache is not None
        fixed, per_token = engine.cache.fixed_bytes, engine.cache.bytes_per_token
    with pytest.raises(UsageError, match="A budget of .* is too small: sliding windows and recurrent states"):
        Engine(config(files[name], budget=f"{fixed}B"))
    with pytest.raises(UsageError, match="Of a budget of .*, sliding windows .* needs at least"):
        Engine(config(files[name], budget=f"{fixed + per_token}B"))
    with Engine(config(files[name], budget=f"{fixed + 200 * per_token}B")) as engine:
        engine.prefill(TEXT[:600])
        held = engine.report().tokens.held_mean
        assert 200 - 32 <= held <= 200


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_renumbered_is_refused_at_the_start(name: str, files: dict[str, Path]) -> None:
    policy = make_policy("streaming", {"positions": "rolled"})
    with pytest.raises(UsageError, match="leave out positions=rolled"):
        Engine(EngineConfig(files[name], policy, Budget.parse("64"), n_ctx=512, n_threads=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("policy", "budget"), [("full", "100%"), ("snapkv", "25%"), ("ladder", "25%")])
def test_a_plan_is_what_the_run_takes(name: str, policy: str, budget: str, files: dict[str, Path]) -> None:
    settings = config(files[name], policy, budget)
    with Planner(files[name], free_bytes=1 << 40) as planner:
        need = planner.need(settings, 600, 50)
    with Engine(settings) as engine:
        engine.prefill(TEXT[:600])
        for token in TEXT[600:650]:
            engine.prefill([token], mode="whole")
        kv = engine.report().kv
    assert need.kv.peak_bytes == pytest.approx(kv.peak_bytes, rel=0.03)
    assert need.kv.full_bytes == pytest.approx(kv.full_bytes, rel=0.03)


@pytest.mark.parametrize("name", ["gpt-oss", "cohere2"])
def test_windows_in_q8(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    whole = {"budget": "100%"}
    with Engine(config(files[name], **whole)) as engine, Engine(config(files[name], kv_swa="q8", **whole)) as small:
        for each in (engine, small):
            each.prefill(TEXT[:300])
            mark = each.sequences[0].mark()
            each.prefill(TEXT[300:400])
            assert each.sequences[0].back(mark)
            save(tmp_path / each.config.kv_swa, each, Session())
            for token in TEXT[400:440]:
                each.prefill([token], mode="whole")
        assert engine.cache is not None and small.cache is not None
        # windows of 32 and what is left of a page in f16 are as much as they are themselves
        assert small.report().kv.fixed_bytes < 0.85 * engine.report().kv.fixed_bytes
        assert small.cache.seq_stats(0).fixed_bytes <= small.cache.fixed_bytes * 3
        want, got = engine.context.logits()[0], small.context.logits()[0]
        assert 0 < ((got - want) ** 2).sum() / (want**2).sum() < 1e-3
        small.sequences[0].release()
        load(tmp_path / "q8", small)
        for token in TEXT[400:440]:
            small.prefill([token], mode="whole")
        np.testing.assert_allclose(small.context.logits()[0], got, atol=1e-4)
        with pytest.raises(KVError, match="other settings"):
            small.context.restore(0, engine.context.save(0))
