"""Wheel and source distribution carry the licences of everything inside."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
GRANT = "Permission is hereby granted"
NOTICES = {
    "ggml/src/ggml-cpu/llamafile/sgemm.cpp": f"// Copyright 2024 Mozilla Foundation\n//\n// {GRANT}\n\nint x;",
    "ggml/src/ggml-cpu/ops.cpp": "int y;\n// YaRN algorithm based on Y\n// MIT. Copyright (c) 2023 J and B.\nint z;",
    "ggml/src/ggml-cpu/vec.h": "// adapted from arm limited optimized routine\nfloat e;",
    "src/llama-vocab.cpp": "//\n// BPE\n// adapted from https://github.com/cmp-nct/ggllm.cpp [MIT License]\n//\nint v;",
    "LICENSE": f"MIT License\n\nCopyright (c) the ggml authors\n\n{GRANT}, free of charge\n",
}


@pytest.fixture
def licenses(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "vendor"))
    monkeypatch.delitem(sys.modules, "licenses", raising=False)
    return importlib.import_module("licenses")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in NOTICES.items():
        path = tmp_path / "llama.cpp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "LICENSE.md").write_text("MIT License\n\nCopyright (c) A. B.\n")
    return tmp_path


def test_the_texts_are_taken_from_the_source(licenses: ModuleType, tree: Path) -> None:
    licenses.write(tree / "llama.cpp", tree / "llama_cpp", tree / "out")
    found = {path.name: path.read_text() for path in (tree / "out").iterdir()}
    assert found.keys() == licenses.texts(tree / "llama.cpp", tree / "llama_cpp").keys()
    assert "Copyright 2024 Mozilla Foundation\n\nPermission is hereby granted" in found["llamafile-sgemm.txt"]
    assert "Copyright (c) 2023 J and B." in found["yarn.txt"] and "free of charge" in found["yarn.txt"]
    assert "int " not in "".join(found.values()) and "A. B." in found["llama-cpp-python.txt"]


def test_a_notice_that_is_gone_stops_the_build(licenses: ModuleType, tree: Path) -> None:
    (tree / "llama.cpp" / "ggml/src/ggml-cpu/ops.cpp").write_text("int y;")
    with pytest.raises(LookupError, match="YaRN"):
        licenses.texts(tree / "llama.cpp", tree / "llama_cpp")


def test_the_repository_has_them_and_the_project_packs_them(licenses: ModuleType, tree: Path) -> None:
    names = licenses.texts(tree / "llama.cpp", tree / "llama_cpp").keys()
    assert {path.name for path in (ROOT / "licenses").iterdir()} == names
    for name in names:
        text = (ROOT / "licenses" / name).read_text("utf-8")
        granted = re.search("permission is hereby granted", text, re.IGNORECASE) and "WARRANT" in text
        # of one of them the source has a line of thanks, and names no license
        assert granted or name == "arm-optimized-routines.txt", name
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (patterns,) = re.findall(r"^license-files = \[(.*)\]$", project, re.MULTILINE)
    packed = {path for pattern in re.findall('"(.*?)"', patterns) for path in ROOT.glob(pattern)}
    assert packed == {ROOT / "LICENSE", *(ROOT / "licenses" / name for name in names)}
    page = (ROOT / "docs" / "licenses.md").read_text("utf-8")
    assert all(f"licenses/{name}" in page for name in names) and "licenses.md" in (ROOT / "mkdocs.yml").read_text()
