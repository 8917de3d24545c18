"""Fetching llama.cpp: nothing of a source runs before its hash was compared. The index is a folder."""

from __future__ import annotations

import hashlib
import importlib
import io
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

VENDOR = Path(__file__).parents[3] / "vendor"
NAME, VERSION = "a-source", "1.0"

BACKEND = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).write_text("ran")

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "a_source-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: a-source\\nVersion: 1.0\\n")
    return folder.name

def build_wheel(*_, **__):
    raise RuntimeError("nothing is built")
"""


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(VENDOR))
    for name in ("fetch", "licenses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("fetch")
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, with an sdist whose build backend leaves a mark."""
    folder = tmp_path / "index"
    folder.mkdir()
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        "backend.py": BACKEND,
    }
    with tarfile.open(folder / "a_source-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"a_source-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("MARKER", str(tmp_path / "ran"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def lock(sha256: str) -> dict[str, str]:
    return {"package": NAME, "version": VERSION, "sdist_sha256": sha256, "llama_cpp_commit": "abc"}


def test_a_source_of_another_hash_never_runs(fetch: ModuleType, index: Path, tmp_path: Path) -> None:
    actual = hashlib.sha256((index / "a_source-1.0.tar.gz").read_bytes()).hexdigest()
    with pytest.raises(SystemExit) as caught:
        fetch.get_sdist(lock("0" * 64))
    assert not (tmp_path / "ran").exists()
    text = str(caught.value)
    assert text == f"the sdist of a-source 1.0 has sha256 {actual}, expected {'0' * 64}: not the pinned source"
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pinned_source_is_kept_and_not_fetched_twice(
    fetch: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist = index / "a_source-1.0.tar.gz"
    wanted = lock(hashlib.sha256(sdist.read_bytes()).hexdigest())
    cached = fetch.get_sdist(wanted)
    assert cached.read_bytes() == sdist.read_bytes()
    sdist.unlink()
    assert fetch.get_sdist(wanted) == cached
    cached.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="pip could not download a-source 1.0"):
        fetch.get_sdist(wanted)
