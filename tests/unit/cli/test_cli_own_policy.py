"""A policy of one's own: only one that is typed may be imported from the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from dataclasses import dataclass
from pathlib import Path
from kvlocal.policies.streaming import Streaming
Path("imported").write_text("")

@dataclass(frozen=True)
class Mine(Streaming):
    \"\"\"Mine.\"\"\"
    name = "mine"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lying_here.py").write_text(CODE)
    return tmp_path


def kvlocal(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # as the command, and as `python -m kvlocal`, which puts the working directory first
    return subprocess.run(
        [sys.executable, "-m", "kvlocal", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


LINES = ("run missing.gguf -p x", "plan missing.gguf", "bench missing.gguf", "eval needle missing.gguf --as-is")


@pytest.mark.parametrize("line", LINES)
def test_a_variable_has_nothing_imported_from_here(folder: Path, line: str) -> None:
    result = kvlocal(folder, *line.split(), KVLOCAL_POLICY="lying_here:Mine")
    assert result.returncode == 2 and "No module named 'lying_here'" in result.stderr
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(("line", "table"), [(LINES[0], "run"), (LINES[0], "defaults"), (LINES[2], "bench")])
def test_nor_has_a_configuration_file(folder: Path, line: str, table: str) -> None:
    file = folder / "config.toml"
    file.write_text(f'[{table}]\npolicy = "lying_here:Mine"\n')
    result = kvlocal(folder, "--config", str(file), *line.split())
    assert result.returncode == 2 and "No module named 'lying_here'" in result.stderr
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("line", [LINES[0], LINES[2], LINES[3]])
def test_what_is_typed_is_imported_from_here(folder: Path, line: str) -> None:
    result = kvlocal(folder, *line.split(), "--policy", "lying_here:Mine")
    assert "missing.gguf" in result.stderr and "No module" not in result.stderr
    assert (folder / "imported").exists()


def test_a_module_that_a_variable_names_may_be_installed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = kvlocal(elsewhere, *LINES[0].split(), KVLOCAL_POLICY="lying_here:Mine", PYTHONPATH=_path(folder))
    assert "missing.gguf" in result.stderr and "No module" not in result.stderr


def _path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
