"""What `kvlocal plan` says a run takes is what the run then takes, on the default model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import call

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.measure.plan import Plan, Planner
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

N_PROMPT, N_GENERATE = 1000, 40
SETTINGS = [
    "full 100% f16 exact",
    "full 100% kv3 exact",
    "full 100% kv3 chunked",
    "ladder 256 f16 exact",
    "ladder 12MiB f16 chunked",
    "ada-snapkv 25% f16 exact",
    "ada-snapkv 256 q4 exact",
    "streaming 256 f16 chunked",
    "h2o 256 kivi exact",
]


def make_config(path: Path, text: str) -> EngineConfig:
    policy, budget, storage, prefill = text.split()
    return EngineConfig(
        path,
        make_policy(policy),
        Budget.parse(budget),
        n_ctx=2048,
        n_threads=2,
        storage=Storage.parse(storage),
        prefill="chunked" if prefill == "chunked" else "exact",
        chunk=256,
    )


@pytest.mark.parametrize("text", SETTINGS)
def test_every_figure_is_within_3_percent(default_path: Path, log_text: str, text: str) -> None:
    config = make_config(default_path, text)
    with Planner(default_path) as planner:
        need = planner.need(config, N_PROMPT, N_GENERATE)
    with Engine(config) as engine:
        engine.prefill(engine.tokenize(log_text)[:N_PROMPT])
        "".join(engine.generate(N_GENERATE, Sampling(temp=0, ignore_eos=True)))
        kv, stats, buffers = engine.report().kv, engine.context.stats(), engine.context.breakdown()
    planned = {
        "weights": need.weights_bytes,
        "compute": need.compute_bytes,
        "full": need.kv.full_bytes,
        "used": need.kv.used_bytes,
        "peak": need.kv.peak_bytes,
        "queries": need.kv.query_bytes,
    }
    real = {
        "weights": buffers.model_bytes,
        "compute": buffers.compute_bytes,
        "full": kv.full_bytes,
        "used": kv.used_bytes,
        "peak": kv.peak_bytes,
        "queries": stats.query_bytes,
    }
    assert planned == pytest.approx(real, rel=0.03)
    assert planned["full"] == real["full"]
    assert planned["queries"] == real["queries"]


def test_a_prompt_read_in_chunks_is_not_rehearsed_for_longer_than_it_takes(default_path: Path) -> None:
    config = replace(make_config(default_path, "streaming 256 f16 chunked"), n_ctx=8192)
    with Planner(default_path) as planner:
        long, short = planner.need(config, 7001, 8), planner.need(config, 7001 - 2048, 8)
    assert (long.kv.used_bytes, long.kv.peak_bytes) == (short.kv.used_bytes, short.kv.peak_bytes)
    assert long.kv.full_bytes - short.kv.full_bytes == 2048 * long.kv.full_bytes // 7009


def test_sequences_in_parallel_take_as_much_each(default_path: Path) -> None:
    with Planner(default_path) as planner:
        for text in ("full 100% f16 exact", "streaming 256 f16 chunked"):
            config = make_config(default_path, text)
            one = planner.need(config, 500, 8).kv
            four = planner.need(replace(config, n_seq_max=4), 500, 8).kv
            assert (four.full_bytes, four.used_bytes) == (4 * one.full_bytes, 4 * one.used_bytes)
            assert 3 * one.used_bytes < four.peak_bytes <= 4 * one.peak_bytes


def largest(path: Path, text: str, free_bytes: int) -> Plan:
    with Planner(path, free_bytes=free_bytes) as planner:
        return planner.plan(make_config(path, text), 0, 64)


def test_the_largest_context_fits_and_a_hundredth_more_does_not(default_path: Path) -> None:
    free_bytes = 170 << 20
    found = largest(default_path, "full 100% f16 exact", free_bytes)
    with Planner(default_path, free_bytes=free_bytes) as planner:
        for storage, n_ctx in found.max_context.items():
            assert n_ctx is not None and 1024 < n_ctx < 8192
            config = make_config(default_path, f"full 100% {storage} exact")
            more = n_ctx + 256 + n_ctx // 100
            assert planner.fits(planner.need(replace(config, n_ctx=n_ctx), n_ctx - 65, 64))
            assert not planner.fits(planner.need(replace(config, n_ctx=more), more - 65, 64))


def test_the_command_says_whether_it_fits_and_what_would(default_path: Path) -> None:
    fits = call("plan", default_path, *["-c", "2048", "--n-prompt", "1000", "--generate", "8", "--json"])
    assert (fits.code, fits.stderr) == (0, "")
    plan = json.loads(fits.stdout)
    assert plan["fits"] and plan["suggestion"] is None
    assert plan["total_bytes"] == plan["weights_bytes"] + plan["compute_bytes"] + sum(
        plan["kv"][name] for name in ("peak_bytes", "query_bytes", "table_bytes")
    )
    options = ["--n-prompt", "6000", "--generate", "8", "--memory", "180MiB", "--json"]
    fits_not = call("plan", default_path, "--policy", "full", *options)
    assert fits_not.code == 1
    words = json.loads(fits_not.stdout)["suggestion"].split()
    assert words[:2] == ["kvlocal", "run"]
    again = call("plan", *words[2:], *options)
    assert again.code == 0, again.stdout
