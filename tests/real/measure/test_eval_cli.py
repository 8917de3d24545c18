"""`kvlocal eval` on the tiny model, end to end: figures that hold, records that are used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader
from kvlocal_cli.main import main
from needles import FACTS, document

from kvlocal.eval.stage import Stage
from kvlocal.measure.code import commit
from kvlocal.measure.variants import Variant

NEEDLE = "needle --kind words --lengths 400,600 --depths 0,0.5 --budget 25%"
KLD = "kld --context 192 --continue 48 --contexts 2 --budget 50%,25%"
PPL = "ppl --context 128 --continue 160 --budget 64"

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records and copies of models go, in place of the user's folder."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path / "cache" / "kvlocal"))
    return tmp_path / "cache" / "kvlocal"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(document(*FACTS, before=9, after=12))
    return path


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the variants that were measured, as they are."""
    labels: list[str] = []
    branch = Stage.branch

    def counted(stage: Stage, seq: int, variant: Variant) -> object:
        labels.append(variant.label)
        return branch(stage, seq, variant)

    monkeypatch.setattr(Stage, "branch", counted)
    return labels


@pytest.fixture
def run(tiny_path: Path, book: Path, cache: Path) -> Run:
    """``run(line, *more)``: what `kvlocal eval LINE -o json` prints."""

    def get(line: str, *more: str) -> dict[str, Any]:
        name, *args = line.split()
        text = ["--text", str(book)] if name in ("kld", "ppl") else []
        args = ["eval", name, str(tiny_path), *args, *more, *text, "-t", "1", "-ub", "64", "-o", "json"]
        result = CliRunner().invoke(main, args, catch_exceptions=False)
        assert (result.exit_code, result.stderr) == (0, "")
        return json.loads(result.stdout)

    return get


def table(printed: dict[str, Any], *keys: str) -> dict[Any, dict[str, Any]]:
    return {tuple(row[key] for key in keys): row for row in printed["results"]}


def test_a_needle_is_lost_when_the_question_comes_later(run: Run, tmp_path: Path) -> None:
    plot = tmp_path / "needle.svg"
    printed = run(f"{NEEDLE} --policy full,paged,snapkv --policy-arg window=12 --plot {plot}")
    assert printed["metric"] == "needle" and printed["settings"]["lengths"] == [400, 600]
    found = table(printed, "policy", "question")
    assert len(found) == 6 and all(row["n"] == 4 for row in found.values())
    for question in ("inside", "after"):
        for policy in ("full", "paged"):
            assert found[policy, question]["score"] >= 0.75 and found[policy, question]["held"] == 1
        assert found["snapkv", question]["held"] == pytest.approx(0.25, abs=0.01)
    assert found["snapkv", "inside"]["score"] >= found["snapkv", "after"]["score"] + 0.5
    assert "<!-- snapkv 25% -->" in plot.read_text()


def test_later_questions_have_a_score_of_their_own(run: Run) -> None:
    line = NEEDLE.replace("400,600", "400").replace("0,0.5", "0.5")
    (row,) = run(f"{line} --mode multi-turn --ask inside --policy paged --parallel 1")["results"]
    assert row["score"] == pytest.approx((row["score_first"] + 2 * row["score_later"]) / 3)


def test_divergence_falls_with_what_is_held(run: Run) -> None:
    printed = run(f"{KLD} --policy paged,streaming,snapkv")
    found = table(printed, "policy", "budget")
    assert printed["settings"]["f32"] is False and all(row["n"] == 2 for row in found.values())
    assert found["paged", "100%"]["kl"] == 0
    for policy in ("streaming", "snapkv"):
        assert found[policy, "25%"]["kl"] > found[policy, "50%"]["kl"] > found[policy, "50%"]["floor"]


def test_perplexity_of_f32_weights(run: Run, cache: Path) -> None:
    printed = run(f"{PPL} --policy paged,random", "--f32")
    found = table(printed, "policy")
    assert found["paged",]["ppl_ratio"] == 1 < found["random",]["ppl_ratio"]
    assert printed["settings"]["f32"] is True and np.isfinite(found["random",]["ppl"])
    (copy,) = (cache / "models").iterdir()
    assert {tensor.tensor_type for tensor in GGUFReader(copy).tensors} == {GGMLQuantizationType.F32}
    assert len(list((cache / "eval").iterdir())) == 1


@pytest.mark.parametrize("line", [NEEDLE, KLD, PPL], ids=lambda line: line.split()[0])
def test_what_is_on_record_is_measured_again_only_when_asked(line: str, run: Run, branches: list[str]) -> None:
    first = run(f"{line} --policy streaming")["results"]
    assert branches
    branches.clear()
    assert run(f"{line} --policy streaming")["results"] == first and not branches
    assert len(run(f"{line} --policy streaming,knorm")["results"]) == 2 * len(first)
    assert {label.split()[0] for label in branches} <= {"knorm", "paged"} and branches
    # another way to measure is another record
    branches.clear()
    run(f"{line} --policy streaming --evict-every 8")
    assert branches
    branches.clear()
    again = run(f"{line} --policy streaming --fresh")["results"]
    assert branches and [row["held_tokens"] for row in again] == [row["held_tokens"] for row in first]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (NEEDLE, "Error: the case needle-single-words/600-"),
        (KLD, "Error: an excerpt needs a context of 241 tokens, --ctx-size gives it 128; give more, or 0 "),
    ],
)
def test_a_context_that_is_too_small_is_refused_before_anything_is_measured(
    line: str, expected: str, tiny_path: Path, book: Path, cache: Path
) -> None:
    name, *args = line.split()
    text = ["--text", str(book)] if name == "kld" else []
    result = CliRunner().invoke(main, ["eval", name, str(tiny_path), *args, *text, "-c", "128"])
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith(expected)
    assert not (cache / "eval").exists()


def test_an_edited_plugin_is_measured_again(
    run: Run, branches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "edited_policy.py"
    source = (
        "from dataclasses import dataclass\nfrom kvlocal.policies.streaming import Streaming\n\n"
        '@dataclass(frozen=True)\nclass Mine(Streaming):\n    """Mine."""\n    name = "mine"\n    n = 1\n'
    )
    plugin.write_text(source)
    line = "needle --kind words --lengths 400 --depths 0 --budget 25% --ask inside --policy edited_policy:Mine"
    first = run(line)["results"][0]
    assert first["commit"] == commit()
    measured = len(branches)
    run(line)
    assert len(branches) == measured > 0, "on record"
    plugin.write_text(source.replace("n = 1", "n = 2"))
    run(line)
    assert len(branches) > measured
