"""`kvlocal bench` on models that run: real figures, by their order and not by their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvlocal_cli.main import main

from kvlocal.measure.bench import bench
from kvlocal.measure.bench_config import BenchConfig, Result
from kvlocal.measure.variants import Prefill, expand
from kvlocal.models.random import Shape, write_random_model
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.formats import BITS
from kvlocal.native.model import Model
from kvlocal.storage.storage import STORAGES, Storage

LLAMA = Shape("tiny", "llama", 2, 256, 4, 2, 32, 512, 300, 10000.0, 64, tied=True)
QWEN = Shape("tiny-qwen", "qwen2", 2, 256, 4, 1, 64, 512, 300, 10000.0, 64, tied=False)
BOTH: tuple[Prefill, ...] = ("exact", "chunked")


def measure(path: Path, names: str, budget: str = "25%", **fields: Any) -> dict[tuple[str, str, int], Result]:
    variants = expand(names.split(","), {}, [budget], prefills=BOTH)
    small = {"n_prompt": 16, "n_gen": 4, "repetitions": 2, "chunk": 64, "n_ubatch": 64, "n_batch": 64, "n_threads": 1}
    model = Model(path)
    try:
        results = list(bench(model, BenchConfig(variants, **(small | fields))))
    finally:
        model.close()
    return {(r.policy, r.prefill, r.depth): r for r in results}


def check(results: dict[tuple[str, str, int], Result], depth: int) -> None:
    """What holds on every model: what is held, at its peak and by whom."""
    full = results["full", "exact", depth]
    assert full.used_bytes == full.peak_bytes == full.full_bytes > 0
    for (policy, prefill, _), result in results.items():
        if result.depth != depth:
            continue
        assert result.full_bytes == full.full_bytes
        assert result.prefill_tps and result.prefill_tps_min and result.prefill_tps_max and result.prompt_tps
        assert 0 < result.prefill_tps_min <= result.prefill_tps <= result.prefill_tps_max
        assert result.ttft_s is not None and result.ttft_s > result.prompt_s > 0
        assert result.attention_bytes_per_token is not None and result.attention_bytes_per_token > result.used_bytes
        if policy in ("full", "paged"):
            assert (result.held_mean, result.used_bytes, result.evict_s) == (depth, full.used_bytes, None)
            continue
        assert result.held_mean == depth // 4 and result.used_bytes * 4 == full.used_bytes
        assert result.evict_s is not None and result.evict_s > 0
        if prefill == "chunked":
            assert result.used_bytes < result.peak_bytes < full.peak_bytes
        else:
            assert result.peak_bytes >= full.peak_bytes


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=lambda shape: shape.name)
def test_random_models_load_and_compute(tmp_path: Path, shape: Shape) -> None:
    model = Model(write_random_model(shape, tmp_path / "m.gguf"))
    assert (model.name, model.n_vocab, model.n_ctx_train) == (f"random {shape.name}", 300, 64)
    assert model.detokenize(model.tokenize("w1 ☂", add_special=False)).strip() == "w1 ☂"
    logits = []
    for paged in (True, False):
        with Context(model, ContextConfig(n_ctx=64, n_threads=1, paged=paged)) as context:
            context.decode([1, 260, 270, 280, 290], 0)
            logits.append(context.logits()[0])
    model.close()
    assert np.isfinite(logits).all() and 0.5 < np.std(logits[1]) < 2
    assert np.abs(logits[0] - logits[1]).max() < 0.1


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=lambda shape: shape.name)
def test_depths_far_beyond_the_training_context(tmp_path: Path, shape: Shape) -> None:
    path = write_random_model(shape, tmp_path / "m.gguf")
    results = measure(path, "full,paged,ada-snapkv,streaming", depths=(0, 256, 512))
    assert len(results) == 6 * 3
    empty = [result for (_, _, depth), result in results.items() if depth == 0]
    assert all(r.used_bytes == 0 and r.prompt_tps is None and (r.decode_tps or 0) > 0 for r in empty)
    check(results, 256)
    check(results, 512)


def test_what_is_measured_at_one_depth_changes_nothing_at_the_next(tmp_path: Path) -> None:
    path = write_random_model(LLAMA, tmp_path / "m.gguf")
    names = "full,paged,ada-snapkv"
    alone, after = measure(path, names, depths=(256,)), measure(path, names, depths=(64, 128, 256))
    for key, result in alone.items():
        other = after[key]
        assert (other.held_mean, other.used_bytes, other.full_bytes) == (
            result.held_mean,
            result.used_bytes,
            result.full_bytes,
        )
        assert other.peak_bytes == result.peak_bytes


def test_the_command_on_the_default_model(default_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"bench {default_path} -d 0,256 -p 32 -n 2 -r 1 -t 1 --policy full,paged,ada-snapkv -o json"
    with pytest.raises(SystemExit) as end:
        main(line.split())
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert printed["machine"]["threads"] == 1 and printed["machine"]["read_bytes_per_s"] > 0
    results = {(r["policy"], r["prefill"], r["depth"]): Result(**r) for r in printed["results"]}
    assert len(results) == 6
    check(results, 256)


# --- storages ---------------------------------------------------------------------------------------------------


BY_TOKEN = ("f16", "q8", "q4", "kv3", "kv2")
"""Whose bytes follow from the number of tokens demoted."""


def in_bits(storage: str, n: float) -> float:
    """What ``n`` tokens of ``storage`` take, in tokens of f16; keys and values are of the same width."""
    return n * sum(BITS[storage]) / 32


def of_storages(path: Path, depths: tuple[int, ...], storages: tuple[str, ...]) -> dict[tuple[str, str, int], Result]:
    variants = expand(["full", "paged", "streaming"], {}, ["50%"], storages)
    model = Model(path)
    try:
        config = BenchConfig(
            variants, depths, n_prompt=0, n_gen=40, repetitions=2, n_ubatch=128, n_batch=128, n_threads=1
        )
        return {(r.policy, r.storage, r.depth): r for r in bench(model, config)}
    finally:
        model.close()


def test_the_bytes_of_every_storage_are_those_of_its_pages(tiny_path: Path) -> None:
    results = of_storages(tiny_path, (600,), STORAGES)
    full_bytes = results["full", "f16", 600].full_bytes
    token = full_bytes / 600
    plain = Storage().sink + Storage().tail
    for (policy, storage, _), result in results.items():
        assert result.full_bytes == full_bytes
        assert result.attention_bytes_per_token is not None and result.decode_tps
        idle = policy == "full" or (policy, storage) == ("paged", "f16")
        assert (result.evict_s is None) == idle and result.evict_s != 0
        if storage != "f16":
            assert result.used_bytes < results[policy, "f16", 600].used_bytes
        if storage not in BY_TOKEN:
            continue
        if policy == "full":
            assert result.used_bytes == pytest.approx(token * in_bits(storage, 600), rel=1e-3)
            continue
        held = 600 if policy == "paged" else 300
        n_f16 = held if storage == "f16" else plain
        if policy == "streaming" and storage != "f16":
            # its own few sinks: the storage's others are gone
            assert n_f16 > result.used_bytes / token - in_bits(storage, held - n_f16) > Storage().tail - 1
            continue
        assert result.used_bytes == pytest.approx(token * (n_f16 + in_bits(storage, held - n_f16)), rel=1e-6)
        # 40 tokens, of which the first 32 leave their places in the tail to 32 that are demoted
        more = result.attention_bytes_per_token / token - result.used_bytes / token
        demoted = 0 if storage == "f16" else 8 * (32 - in_bits(storage, 32)) / 40
        assert more == pytest.approx(20.5 - demoted, rel=1e-6)
    for policy in ("paged", "streaming"):
        used = [results[policy, storage, 600].used_bytes for storage in BY_TOKEN]
        assert used == sorted(used, reverse=True)


def test_demotion_at_one_depth_and_in_one_round_changes_nothing_in_the_next(tiny_path: Path) -> None:
    alone, after = (of_storages(tiny_path, depths, ("q8", "kv2")) for depths in ((400,), (100, 300, 400)))
    for key, result in alone.items():
        other = after[key]
        for field in ("held_mean", "used_bytes", "full_bytes", "attention_bytes_per_token"):
            assert getattr(other, field) == getattr(result, field), (key, field)


def test_the_command_measures_storages(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"bench {tiny_path} -d 300 -p 16 -n 34 -r 1 -t 1 --policy full,paged,ada-snapkv --kv q8,kv2"
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--prefill", "exact,chunked", "--chunk", "128", "--budget", "80%", "-o", "json"])
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    results = [Result(**r) for r in printed["results"]]
    ada = [("ada-snapkv", storage, prefill) for storage in ("q8", "kv2") for prefill in BOTH]
    expected = [("full", "q8", "exact"), ("paged", "q8", "exact"), ("paged", "kv2", "exact"), *ada]
    assert [(r.policy, r.storage, r.prefill) for r in results] == expected
    assert all(r.decode_tps and r.prefill_tps for r in results)
    by = {(r.policy, r.storage, r.prefill): r for r in results}
    for storage in ("q8", "kv2"):
        exact, chunked = (by["ada-snapkv", storage, prefill] for prefill in BOTH)
        assert exact.held_mean == chunked.held_mean == 240
        assert max(exact.used_bytes, chunked.used_bytes) < by["paged", storage, "exact"].used_bytes
        assert chunked.peak_bytes < exact.peak_bytes
        assert exact.evict_s and chunked.evict_s
