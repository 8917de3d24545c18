"""`kvlocal doctor`, `pull` and `models` as a user runs them, with the default model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from kvlocal_cli.main import main
from processes import call

from kvlocal.doctor import rows, selftest
from kvlocal.models.folder import cache_dir
from kvlocal.native import library
from kvlocal.native.formats import FORMATS
from kvlocal.native.model import Model


def doctor_here(*arguments: str) -> Result:
    """In this process, so that something can be broken in it."""
    return CliRunner().invoke(main, ["doctor", "-t", "1", *arguments], prog_name="kvlocal")


@pytest.mark.usefixtures("default_path")
def test_all_passes_on_the_default_model(default_path: Path) -> None:
    result = call("doctor", "--json")
    assert (result.code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["ok"] is True and report["failures"] == []
    assert len(report["tests"]) == 4 + 2 * len(FORMATS) and all(test["passed"] for test in report["tests"])
    assert report["library"]["ours"] is True
    assert report["library"]["llama_cpp_commit"] == library.load().commit
    model = report["model"]
    assert (model["path"], model["architecture"], model["refused"]) == (str(default_path), "llama", None)
    assert model["formats"] == dict.fromkeys(FORMATS)
    (cpu,) = (device for device in report["devices"] if device["name"] == "CPU")
    assert cpu["kernels"] in ("tested on hardware", "emulated only")
    (pages,) = model["pages"]
    assert (pages["device"], pages["kernels"]) == ("CPU", cpu["kernels"]) and pages["n_layer"] > 1


def test_the_text_ends_in_the_verdict(tiny_path: Path) -> None:
    result = call("doctor", tiny_path, "-ngl", 9)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.count("  PASS  ") == 4 + 2 * len(FORMATS) and "FAIL" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "Versions" and lines[-1].startswith("Nothing failed")
    assert "  can be stored in    f16 " in result.stdout


def test_a_portable_context_is_told_from_one_with_kernels(tiny_path: Path) -> None:
    result = call("doctor", tiny_path, "--kernels", "portable")
    assert (result.code, result.stderr) == (0, "")
    assert "layers on CPU: portable path\n" in result.stdout and "  can be stored in    f16\n" in result.stdout
    assert "keep their pages" not in result.stdout, "it was asked for"


def test_a_reference_that_differs_fails(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.logits

    def wrong(model: Model, *, portable: bool, n_threads: int = 0) -> dict[str, Any]:
        out = right(model, portable=portable, n_threads=n_threads)
        return {name: logits + 0.01 * np.ptp(logits) * portable for name, logits in out.items()}

    monkeypatch.setattr(selftest, "logits", wrong)
    result = doctor_here(str(tiny_path))
    assert result.exit_code == 1
    assert "\n  FAIL  decode of 8 tokens " in result.stdout and "\n  PASS  rows of q8 " in result.stdout
    assert result.stdout.endswith("4 failures.\n")


def test_a_format_that_is_decoded_wrongly_fails(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.decode_rows

    def wrong(row: str, stored: Any, *, plain: bool = False) -> Any:
        return right(row, stored, plain=plain) + np.float32(plain and row == "kv3")

    monkeypatch.setattr(rows, "decode_rows", wrong)
    result = doctor_here(str(tiny_path), "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    failed = [test["name"] for test in report["tests"] if not test["passed"]]
    assert failed == ["rows of kv3", "attention over kv3"]


def test_a_damaged_model_is_a_failure_in_a_whole_report(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(tiny_path.read_bytes()[:500_000])
    result = call("doctor", path)
    assert result.code == 1 and "Traceback" not in result.stderr
    assert "\nFAIL: " in result.stdout and "cannot be loaded as a GGUF model" in result.stdout
    assert result.stdout.endswith("1 failure.\n")


def test_pull_and_models_name_the_same_file(default_path: Path) -> None:
    pulled = call("pull")
    assert (pulled.code, pulled.stdout, pulled.stderr) == (0, f"{default_path}\n", "")
    listed = json.loads(call("models", "--json").stdout)
    (default,) = (model for model in listed["models"] if model["is_default"])
    assert default["path"] == str(default_path)
    assert (default["architecture"], default["quantization"]) == ("llama", "Q4_1")
    assert default["size_bytes"] == default_path.stat().st_size
    assert listed["caches"]["kvlocal"] == str(cache_dir() / "models")
    found = call("models", "path", default_path.name)
    assert (found.code, found.stdout) == (0, f"{default_path}\n")


def test_a_model_is_removed_from_the_cache_alone(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "copy.gguf").write_bytes(tiny_path.read_bytes())
    (folder / "link.gguf").symlink_to(tiny_path)
    env = {"KVLOCAL_CACHE": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    refused = call("models", "rm", tiny_path, "--yes", env=env)
    assert refused.code == 2 and refused.stderr.startswith("Error: There is no model ")
    for name in ("copy.gguf", "link.gguf"):
        asked = call("models", "rm", name, stdin="y\n", env=env)
        assert asked.code == 0 and asked.stderr.startswith(f"Remove {name} (")
    assert list(folder.iterdir()) == [] and tiny_path.is_file()
    assert call("models", env=env).stderr.startswith("There are no models here yet")
