"""`kvlocal bench` on models that run: real figures, by their order and not by their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvlocal_cli.main import main

from kvlocal.bench import BenchConfig, Result, bench
from kvlocal.context import Context, ContextConfig
from kvlocal.model import Model
from kvlocal.random_model import Shape, write_random_model
from kvlocal.sweep import Prefill, expand

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
