"""The benchmark of storages at depth, over the tiny model: every row is there, its bytes and ratios fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlocal.measure.variants import STOCK_STORAGES
from kvlocal.native.model import Model
from kvlocal.storage.storage import STORAGES

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "depth_storage.py"
LANES = [*(("ours", storage) for storage in STORAGES), *(("stock", storage) for storage in STOCK_STORAGES)]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=300)


def test_every_storage_is_measured_at_depths_past_the_training_context(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    model = Model(tiny_path)
    deep = model.n_ctx_train + 32
    model.close()
    done = run("--model", str(tiny_path), "--depths", f"{deep},320", "-n", "2", "-r", "2", "-t", "1", "-o", str(file))
    assert done.returncode == 0, done.stderr
    printed = json.loads(file.read_text("utf-8"))
    assert printed["machine"]["threads"] == 1
    rows: list[dict[str, Any]] = printed["results"]["rows"]
    assert [(r["depth"], r["cache"], r["storage"]) for r in rows] == [(d, *lane) for d in (320, deep) for lane in LANES]
    by = {(r["depth"], r["cache"], r["storage"]): r for r in rows}
    for row in rows:
        depth, stock = row["depth"], row["cache"] == "stock"
        for values in (row["decode_tps"], *row["vs"].values()):
            assert 0 < values[1] <= values[0] <= values[2]
        for label, values in row["vs"].items():
            if label == f"{row['cache']} {row['storage']}":
                assert values == [1, 1, 1]
        assert (row["used_bytes"] < by[depth, "ours", "f16"]["used_bytes"]) == (row["storage"] != "f16")
        demotes = not stock and row["storage"] != "f16"
        by_page = demotes and row["storage"] != "logquant"
        assert ("demote_page_s" in row) == ("demote_page_per_layer_step" in row) == by_page
        assert (row["store_s"] is not None) == demotes
        assert not demotes or row["store_s"] > 0
        assert not by_page or row["demote_page_s"][1] > 0
        assert f"| {depth} | {row['cache']} {row['storage']} |" in done.stdout
    assert by[320, "ours", "f16"]["used_bytes"] == by[320, "stock", "f16"]["used_bytes"]


@pytest.mark.parametrize("wrong", [("--depths", "100"), ("-n", "0"), ("-r", "0")])
def test_what_could_not_be_measured_is_refused(wrong: tuple[str, str], tiny_path: Path) -> None:
    done = run("--model", str(tiny_path), *wrong)
    assert done.returncode == 2 and "a depth is at least" in done.stderr


def test_ratios_are_of_one_round_and_a_page_is_one_of_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from depth_storage import Lane, results

    # two layers of three KV heads
    ours = SimpleNamespace(cache=SimpleNamespace(layers=[SimpleNamespace(n_head_kv=3)] * 2))
    stock: Any = SimpleNamespace(cache=None)
    lanes = [
        Lane(ours, "f16", decode_s=[2.0, 8.0, 4.0]),
        Lane(ours, "q8", decode_s=[1.0, 4.0, 1.0], demote_s=[3.0, 6.0, 6.0]),
        Lane(stock, "f16", decode_s=[4.0, 8.0, 4.0]),
        Lane(stock, "q4", decode_s=[8.0, 8.0, 8.0]),
    ]
    q8 = results(lanes, 512)[1]
    assert q8["decode_tps"] == [1.0, 0.25, 1.0]
    assert q8["vs"] == {"ours f16": [2.0, 2.0, 4.0], "stock f16": [4.0, 2.0, 4.0], "stock q4": [8.0, 2.0, 8.0]}
    assert q8["demote_page_s"] == [1.0, 0.5, 1.0]
    # a step of one layer takes 0.5, 2 and 0.5 s
    assert q8["demote_page_per_layer_step"] == [1.0, 0.5, 2.0]
