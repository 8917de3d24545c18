"""The benchmarks behind the claims about storages, over the tiny model: what they say fits together, and what the page
says follows from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from needles import LANTERN, document

from kvlocal.measure.code import commit
from kvlocal.storage.storage import Storage

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
NOVELS = ("Burnett_Garden_1911.txt", "Doyle_Hound_1902.txt")
PROTECTIONS = ["nothing", "last 128", "4, last 128", "32, last 128", "LogQuant's"]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import storage_claims

    return storage_claims


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from pages import storage

    return storage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts under the names of the novels."""
    root = tmp_path_factory.mktemp("data")
    (root / "text").mkdir()
    for i, name in enumerate(NOVELS):
        (root / "text" / name).write_text(document(LANTERN, before=20 + i, after=20 + i))
    return root


def run(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "-t", "1", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_sequences_fill_the_budget_and_no_more(tiny_path: Path, data: Path, tmp_path: Path, page: ModuleType) -> None:
    budget = 1800 * 1024
    args = ["--model", tiny_path, "--data", data, "--budget", "1800KiB", "--tokens", 256, "--continue", 40]
    args += ["--kv", "q4:sink=4:tail=32,kv3:sink=4:tail=32", "--policy", "ladder:30%", "-o", tmp_path / "parallel.json"]
    done = run("parallel_sequences", *args)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "parallel.json").read_text())["results"]
    rows: list[dict[str, Any]] = found["rows"]
    assert [row["label"] for row in rows] == ["f16", "q4:sink=4:tail=32", "kv3:sink=4:tail=32", "ladder 30%"]
    f16 = 256 * 4 * 2 * 64 * 2 * 2  # tokens, layers, heads, values, keys and values, bytes
    for row in rows:
        n = row["sequences"]
        assert row["stopped"] and n * row["allocated"] / n <= budget < (n + 1) * row["allocated"] / n
        assert f16 <= row["peak"] and row["allocated"] <= row["peak"] <= row["allocated"] + f16
        assert row["within_peak"] <= n and row["ratio"] == n / rows[0]["sequences"]
        assert len(row["kls"]) == min(3, n) and row["kl"] == pytest.approx(np.mean(row["kls"]))
        assert f"| {row['label']} | {n} |" in done.stdout
    assert rows[0]["allocated"] == rows[0]["sequences"] * f16
    # 40 tokens are two more pages of 32 beside eight; what did not fit is gone
    assert rows[0]["allocated_after"] == rows[0]["sequences"] * f16 * 10 / 8
    assert rows[0]["sequences"] < rows[1]["sequences"] < rows[2]["sequences"]
    assert abs(rows[0]["kl"]) < 1e-6 < rows[1]["kl"] < rows[2]["kl"], "other sequences of a batch change nothing"
    text = page.sections(tmp_path)
    assert "$ python benchmarks/parallel_sequences.py --model kvlocal-tiny-q8_0.gguf --budget 1800KiB" in text
    assert str(tmp_path) not in text and "Not measured yet." in text


def test_texts_that_all_fit_are_said_to_be_too_few(claims: ModuleType, tiny_path: Path, data: Path) -> None:
    from parallel_sequences import bound, fill, open_context, variants

    from kvlocal.eval.texts import excerpts
    from kvlocal.native.model import Model

    model = Model(tiny_path)
    found = excerpts(model, [data / "text" / name for name in NOVELS], 128, 8, 1)
    variant = variants("f16", "")[0]
    with open_context(model, variant, 256, 2, 2, 1) as context:
        row = fill(context, found, variant, 1 << 30)
        assert (row["sequences"], row["stopped"], row["within_peak"]) == (2, False, 2)
        bound(context, 0, variant)
        assert context.stats().allocated_bytes == row["allocated"]
    model.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--budget", "25%"), "a budget is in bytes"),
        (("--kv", "q5"), "There is no storage 'q5'"),
        (("--policy", "full:50%"), "drops nothing"),
        (("--budget", "64KiB"), "one sequence takes"),
    ],
)
def test_sequences_that_cannot_be_compared_are_refused(wrong: tuple[str, str], said: str, tiny_path: Path) -> None:
    done = run("parallel_sequences", "--model", tiny_path, *wrong)
    assert done.returncode == 2 and said in done.stderr


def test_every_scheme_is_measured_and_the_page_is_written(
    tiny_path: Path, data: Path, tmp_path: Path, claims: ModuleType, page: ModuleType
) -> None:
    args = ["--model", tiny_path, "--data", data, "--tokens", 320, "--queries", 4, "--continue", 8, "--texts", 1]
    done = run("storage_claims", *args, "-o", tmp_path / "claims.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "claims.json").read_text())["results"]
    assert len(found["models"]) == 2
    for model in found["models"]:
        by = {(row["scheme"], row["protection"]): row for row in model["rows"]}
        assert list(by) == [(scheme.label, protection) for scheme in claims.schemes() for protection in PROTECTIONS]
        assert all(row["error"] > 0 and row["kl"] > 0 for row in by.values())
        assert by["q4", "nothing"]["bits"] == 4.5 and by["kv3", "nothing"]["bits"] == 2.75
        n_f16 = (32 + 128) / 320
        assert by["kv2", "32, last 128"]["bits"] == pytest.approx(16 * n_f16 + 2.25 * (1 - n_f16))
        for protection in PROTECTIONS:
            errors = [by[f"{name}, rotated, mean", protection]["error"] for name in ("q8", "q4", "kv2")]
            assert errors == sorted(errors)
    offsets = found["models"][1]
    kl = {(row["scheme"], row["protection"]): row["kl"] for row in offsets["rows"]}
    logits = {row["storage"]: row["kl"] for row in offsets["logits"]}
    assert tuple(logits) == claims.LOGITS
    for name in ("q4", "kv3", "kv2"):
        assert kl[f"{name}, rotated", "32, last 128"] > 10 * kl[f"{name}, rotated, mean", "32, last 128"]
        assert logits[f"{name}:centre=0"] > 5 * logits[name] > 0
    text = page.sections(tmp_path)
    for line in ("| kv3, rotated, mean | 2.75 |", "| kv2:centre=0 |", "- The mean of the keys:", "- 3-bit keys:"):
        assert line in text
    assert "more than ten times each" in text
    assert f"Measured at commit {commit()}." in text
    assert "$ python benchmarks/storage_claims.py --model kvlocal-tiny-q8_0.gguf --tokens 320 --queries 4" in text


def test_what_is_exact_loses_nothing_and_what_is_stored_is_read_by_the_cache(claims: ModuleType) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 3, 64), (256, 64), (256, 64)))
    k[:, 5] += 50
    head = claims.Head(q, k, v, 64**-0.5)
    assert np.allclose(claims.rotated(claims.rotated(k)), k, atol=1e-4)
    assert claims.hadamard(192).shape == (64, 64)
    none = {"all": np.arange(0), "due": Storage("kv3", sink=4, tail=32).due(256, 0)}
    for scheme in claims.schemes():
        losses = {name: values for _, name, values in claims.losses(head, [scheme], none)}
        assert losses["all"] == pytest.approx([0, 0, 16], abs=1e-6)
        assert (losses["due"][:2] > 1e-6).all()
        got_k, got_v, _ = claims.stored(scheme, head, none["due"])
        n = len(none["due"]) // claims.group_slots(scheme.k_row) * claims.group_slots(scheme.k_row)
        changed = np.flatnonzero((got_k != k).any(axis=1) | (got_v != v).any(axis=1))
        assert np.array_equal(changed, none["due"][:n]), "sinks, tail and what waits for its group stay"


def test_attention_sees_no_later_key(claims: ModuleType) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 4), (6, 4), (6, 4)))
    log_p, out = claims.attention(claims.Head(q, k, v, 0.5), k, v)
    for i in range(3):
        for g in range(2):
            z = k[: 4 + i].astype(np.float64) @ q[i, g] * 0.5
            p = np.exp(z) / np.exp(z).sum()
            assert np.allclose(np.exp(log_p[2 * i + g]), [*p, *[0] * (2 - i)], atol=1e-6)
            assert np.allclose(out[2 * i + g], p @ v[: 4 + i], atol=1e-5)


def test_the_page_says_what_did_not_hold(page: ModuleType, tmp_path: Path) -> None:
    def row(label: str, n: int, size: int, kl: float) -> dict[str, Any]:
        counts = {"sequences": n, "stopped": True, "within_peak": n, "ratio": n / 2}
        sizes = {"allocated": n * size, "peak": n * size}
        return {"label": label, "kl": kl, "kls": [kl], "tokens_per_s": 1.0} | counts | sizes

    rows = [row("f16", 2, 100, 0), row("q4", 6, 40, 0.001), row("kv2", 8, 20, 0.5), row("q8", 4, 70, 0.0001)]
    found = {"command": "x", "model": "m", "budget": 200 << 20, "tokens": 3072, "continue": 64, "rows": rows}
    (tmp_path / "parallel.json").write_text(json.dumps({"results": found}))
    text = page.sections(tmp_path)
    # q8 has twice the sequences, but one of them takes 70 % of the bytes
    assert "it holds for q4 (2.5 times, KL 0.001); it does not for kv2 (4.0 times, KL 0.5), q8 (1.4 times" in text
    assert text.count("Not measured yet.") == 3
    assert [page._change(*of) for of in ((1, 0.5), (1, 15), (1, 1.01), (0, 1))] == [
        "2.0 times less",
        "15 times more",
        "about the same",
        "about the same",
    ]
