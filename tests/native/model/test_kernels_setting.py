"""`kernels`: page kernels where a device has them, or stock operators everywhere; engine and planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinygguf
from contexts import OpenContext, OpenModel

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.errors import UsageError
from kvlocal.eval.stage import Stage, StageConfig
from kvlocal.measure.plan import Planner
from kvlocal.measure.variants import expand
from kvlocal.native.devices import Placement, list_devices
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import STORAGES


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    tinygguf.write_model(path, "llama", n_ctx=2048)
    return path


def config(path: Path, policy: str = "ada-snapkv", **settings: Any) -> EngineConfig:
    return EngineConfig(path, make_policy(policy), Budget.parse("64"), n_ctx=1024, n_threads=1, **settings)


@pytest.mark.parametrize("portable", [False, True])
def test_layers_say_where_their_pages_lie_and_what_reads_them(
    portable: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    context = open_context(open_model("llama", n_layer=3), portable=portable)
    assert context.cache is not None
    assert [(layer.il, layer.device, layer.kernels) for layer in context.cache.layers] == [
        (il, "CPU", not portable) for il in range(3)
    ]


def test_an_engine_without_kernels_computes_the_same(path: Path) -> None:
    tokens = list(np.random.default_rng(5).integers(3, 300, 200))
    logits = {}
    for kernels in ("auto", "portable"):
        with Engine(config(path, kernels=kernels)) as engine:
            assert engine.cache is not None
            assert {layer.kernels for layer in engine.cache.layers} == {kernels == "auto"}
            engine.prefill([int(token) for token in tokens])
            logits[kernels] = engine.sequences[0].last_logits()
            assert engine.cache.mean_slots(0) == 64, "it was evicted"
            # a change that only the kernels allow leaves everything as it is
            if kernels == "portable":
                with pytest.raises(UsageError, match="Policy h2o accumulates the attention"):
                    engine.change(policy=make_policy("h2o"))
                assert engine.policy.name == "ada-snapkv" and engine.cache.mean_slots(0) == 64
    assert logits["auto"] is not None and logits["portable"] is not None
    difference = np.abs(logits["auto"] - logits["portable"]).max()
    assert 0 < difference < 2e-4 * np.ptp(logits["auto"]), "other operators, the same attention"


@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_a_plan_says_what_reads_the_pages(kernels: Any, path: Path) -> None:
    (cpu,) = (device for device in list_devices() if device.name == "CPU")
    with Planner(path) as planner:
        plan = planner.plan(config(path, kernels=kernels), 300, 20)
        stock = planner.plan(config(path, "full", kernels=kernels), 300, 20)
    assert plan.need.pages == [Placement("CPU", 2, cpu.kernels if kernels == "auto" else "portable path")]
    assert plan.as_dict()["pages"][0]["n_layer"] == 2
    assert stock.need.pages == [], "llama.cpp's own cache has none"
    stored = {name for name, n_ctx in plan.max_context.items() if n_ctx}
    assert stored == (set(STORAGES) if kernels == "auto" else {"f16"})


@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_an_evaluation_reads_its_texts_with_them(kernels: Any, open_model: OpenModel) -> None:
    config = StageConfig(n_ctx=256, parallel=1, n_threads=1, kernels=kernels)
    with Stage(open_model("llama"), expand(["snapkv"], {}, ["50%"]), config) as stage:
        assert stage.context.cache is not None
        assert {layer.kernels for layer in stage.context.cache.layers} == {kernels == "auto"}
