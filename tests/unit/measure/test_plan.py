"""How a planner looks for what fits; runs are replaced by a made-up number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.engine.config import EngineConfig
from kvlocal.errors import UsageError
from kvlocal.measure.plan import STEP, KVPlan, Need, Planner, alternatives
from kvlocal.native.threads import Cores
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import STORAGES, Storage


def make_config(policy: str = "ladder", budget: str = "2048", storage: str = "f16", **settings: Any) -> EngineConfig:
    return EngineConfig(
        Path("m.gguf"), make_policy(policy), Budget.parse(budget), storage=Storage.parse(storage), **settings
    )


class Imagined(Planner):
    """Runs take what a function says."""

    def __init__(self, total: Callable[[EngineConfig], int], free_bytes: int, n_ctx_train: int = 32768) -> None:
        self.model: Any = SimpleNamespace(n_ctx_train=n_ctx_train, name="imagined")
        self.free_bytes, self.device_free_bytes = free_bytes, 0
        self._total, self.tried = total, list[EngineConfig]()

    def need(self, config: EngineConfig, n_prompt: int, n_generate: int, *, to_peak: bool = False) -> Need:
        self.tried.append(config)
        return Need(0, KVPlan(0, 0, 0, 0, 0), 0, self._total(config))


@given(
    base=st.integers(0, 10**9),
    per_token=st.integers(0, 10**6),
    step=st.integers(0, 10**7),
    free=st.integers(0, 10**10),
    cap=st.integers(1000, 200_000),
)
def test_the_largest_context_fits_and_one_step_more_would_not(base, per_token, step, free, cap) -> None:
    def total(config: EngineConfig) -> int:
        return base + per_token * config.n_ctx + step * (config.n_ctx // 10_000)

    planner = Imagined(total, free, cap)
    found = planner.max_context(make_config("full"), 64)
    if found == 0:
        assert base + per_token * STEP > free
        return
    assert found is not None and total(make_config("full", n_ctx=found)) <= free
    assert len(planner.tried) <= 8
    if found < cap:
        assert found % STEP == 0
        # bytes that do not grow evenly cost some precision
        assert total(make_config("full", n_ctx=found + STEP)) > free - (step + step * cap // 10_000)


def test_a_context_is_never_larger_than_what_the_model_was_trained_for_or_was_asked_for() -> None:
    planner = Imagined(lambda config: 0, 1, 8192)
    assert planner.max_context(make_config(), 64) == 8192
    assert planner.max_context(make_config(n_ctx=16384), 64) == 16384
    assert planner.max_context(make_config(n_ctx=1000), 64) == 8192


def test_a_run_that_takes_all_there_is_fits_and_one_byte_more_does_not() -> None:
    assert Imagined(lambda config: 4096, 4096).plan(make_config(n_ctx=8192)).fits
    assert not Imagined(lambda config: 4097, 4096).plan(make_config(n_ctx=8192)).fits
    assert Imagined(lambda config: 10 * config.n_ctx, 10 * 5120).max_context(make_config(), 64) == 5120


def test_a_storage_that_cannot_be_has_no_context() -> None:
    def total(config: EngineConfig) -> int:
        if config.storage.name == "kv3":
            raise UsageError("heads of 80 values cannot be stored")
        return config.n_ctx

    contexts = Imagined(total, 4096).max_contexts(make_config("full"), 64)
    assert list(contexts) == list(STORAGES)
    assert contexts["kv3"] is None
    assert {n for name, n in contexts.items() if name != "kv3"} == {4096}


def test_a_policy_that_chooses_formats_has_one_entry_under_its_name() -> None:
    assert Imagined(lambda config: config.n_ctx, 4096).max_contexts(make_config(), 64) == {"ladder": 4096}


def test_what_was_asked_for_is_filled_with_a_prompt_unless_one_is_given() -> None:
    planner = Imagined(lambda config: 0, 1)
    plan = planner.plan(make_config(n_ctx=8192))
    assert (plan.n_prompt, plan.n_generate, plan.fits, plan.suggestion) == (8192 - 1 - 512, 512, True, {})
    assert planner.plan(make_config(n_ctx=400)).n_generate == 100
    plan = planner.plan(make_config(), 1000, 8)
    assert (plan.n_ctx, plan.n_prompt, plan.n_generate) == (32768, 1000, 8)


def test_an_answer_as_long_as_the_context_leaves_no_room_for_a_prompt() -> None:
    with pytest.raises(UsageError, match="A context of 512 tokens has no room for a prompt and 512 tokens after it"):
        Imagined(lambda config: 0, 1).plan(make_config(n_ctx=512), 0, 512)


def test_first_suggested_is_a_context_that_is_just_large_enough() -> None:
    plan = Imagined(lambda config: config.n_ctx, 4096).plan(make_config("full", n_ctx=8192), 1000, 100)
    assert (plan.fits, plan.suggestion) == (False, {"n_ctx": 1280})


def test_then_chunks_and_then_smaller_budgets() -> None:
    def chunks(config: EngineConfig) -> int:
        return 0 if config.prefill == "chunked" else 2

    assert Imagined(chunks, 1).plan(make_config(n_ctx=8192)).suggestion == {"prefill": "chunked"}

    def small(config: EngineConfig) -> int:
        return int(config.budget.value) if config.prefill == "chunked" else 10**6

    plan = Imagined(small, 600).plan(make_config(n_ctx=8192))
    assert plan.suggestion == {"budget": "512", "prefill": "chunked"}


def test_where_nothing_is_evicted_the_ladder_is_suggested() -> None:
    def total(config: EngineConfig) -> int:
        return 10**6 if config.policy.name == "full" else 0

    plan = Imagined(total, 1).plan(make_config("full", "100%", "kv3", n_ctx=8192))
    assert plan.suggestion == {"budget": "2048", "prefill": "chunked", "policy": "ladder", "storage": "f16"}


def test_without_page_kernels_only_f16_and_no_ladder_is_suggested() -> None:
    def total(config: EngineConfig) -> int:
        assert config.kernels == "portable"
        return 10**6 if config.policy.name == "full" else 0

    plan = Imagined(total, 1).plan(make_config("full", "100%", n_ctx=8192, kernels="portable"))
    assert plan.suggestion == {"budget": "2048", "prefill": "chunked", "policy": "ada-snapkv", "storage": "f16"}
    assert plan.max_context == {name: 0 if name == "f16" else None for name in STORAGES}


def test_last_of_all_is_a_smaller_context_if_no_prompt_was_asked_for() -> None:
    def total(config: EngineConfig) -> int:
        return config.n_ctx * (1 if config.storage.name == "q4" else 4)

    planner = Imagined(total, 2048)
    assert planner.plan(make_config("full", n_ctx=8192)).suggestion == {"n_ctx": 2048, "storage": "q4"}
    assert planner.plan(make_config("full", n_ctx=8192), 7000).suggestion == {}
    assert planner.plan(make_config("full", n_ctx=8192, storage="q4")).suggestion == {"n_ctx": 2048}


def test_nothing_helps_when_the_weights_alone_are_too_large() -> None:
    plan = Imagined(lambda config: 2, 1).plan(make_config(n_ctx=8192))
    assert (plan.fits, plan.suggestion, plan.max_context) == (False, {}, {"ladder": 0})


def test_alternatives_are_settings_of_their_own_words() -> None:
    for config in (make_config(n_ctx=8192), make_config("full", "100%", "q4", n_ctx=8192)):
        for options, other in alternatives(config, 8192):
            words = {"budget": str(config.budget), "policy": config.policy.name, "storage": config.storage.name}
            words |= {"prefill": config.prefill, "n_ctx": config.n_ctx} | options
            got = {"budget": str(other.budget), "policy": other.policy.name, "storage": other.storage.name}
            assert got | {"prefill": other.prefill, "n_ctx": other.n_ctx} == words


def test_a_budget_that_leaves_no_room_for_a_chunk_is_no_alternative() -> None:
    budgets = [options.get("budget") for options, _ in alternatives(make_config("full", n_ctx=1000), 1000)]
    assert budgets == ["256"]


def test_the_plan_says_how_many_threads_compute_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlocal.measure.plan.usable_cores", lambda: Cores(16, 8, 0, 2.5))
    plan = Imagined(lambda config: 0, 1).plan(make_config())
    assert plan.threads == 3 and plan.threads_reason.startswith("8 physical cores of 16")
    plan = Imagined(lambda config: 0, 1).plan(make_config(n_threads=5))
    assert (plan.threads, plan.threads_reason) == (5, "as asked for")
