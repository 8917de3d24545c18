"""Which libraries are loaded: the package's own, or those in the folder that KVLOCAL_LIB_DIR names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvlocal.native import library

LOAD = """
from kvlocal.errors import KVError
from kvlocal.native import library
try:
    print(library.load().lib._name)
except KVError as error:
    print("refused:", error)
"""


def loaded(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=os.environ | {library.LIB_DIR: str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_libraries_of_another_folder_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIB_DIR, raising=False)
    usual = library.installed("lib")
    for path in usual.iterdir():
        shutil.copy(path, tmp_path)
    assert Path(loaded(tmp_path)).parent == tmp_path != usual
    monkeypatch.setenv(library.LIB_DIR, str(tmp_path))
    assert library.installed("lib") == tmp_path and library.installed("binding") == usual.parent / "binding"


def test_a_folder_without_libraries_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        said = loaded(folder)
        assert said.startswith(f"refused: KVLOCAL_LIB_DIR names {folder}, where no libllama is: ")
