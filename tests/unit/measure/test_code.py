"""What was measured with other code is not handed back: every byte of package, library and plugin counts."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvlocal
from kvlocal.eval.records import Record, Store, rows, store_path, variant_key
from kvlocal.measure import code
from kvlocal.measure.variants import Variant
from kvlocal.native import library
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

PLUGIN = """
from dataclasses import dataclass
from kvlocal.policies.streaming import Streaming
{more}

@dataclass(frozen=True)
class Mine(Streaming):
    \"\"\"A policy of somebody else.\"\"\"
    name = "mine"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package and of a small library, which the hashes are taken of."""
    root = tmp_path / "tree"
    shutil.copytree(code.PACKAGE, root / "kvlocal", ignore=shutil.ignore_patterns("__pycache__", "lib", "binding"))
    for part in ("lib", "binding"):
        (root / part).mkdir()
        (root / part / f"{part}.so").write_bytes(bytes(1000))
    monkeypatch.setattr(code, "PACKAGE", root / "kvlocal")
    monkeypatch.setattr(library, "installed", lambda part: root / part)
    return root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, for plugins; what was imported from it is forgotten afterwards."""
    root = tmp_path / "work"
    root.mkdir()
    monkeypatch.chdir(root)
    before = set(sys.modules)
    yield root
    for name in set(sys.modules) - before:
        if str(root) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def flip(path: Path, at: int = -2) -> None:
    """Another byte; size and time of change as before."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "file",
    (
        *("kvlocal/policies/ladder.py", "kvlocal/policies/parts/scoring.py", "kvlocal/eval/stage.py"),
        *("lib/lib.so", "binding/binding.so"),
    ),
)
def test_an_edit_of_equal_size_gives_another_record(model: Path, tree: Path, file: str) -> None:
    before = store_path(model, "kld", {})
    assert store_path(model, "kld", {}) == before
    flip(tree / file)
    assert store_path(model, "kld", {}) != before


def test_code_that_moves_to_another_file_gives_another_record(model: Path, tree: Path) -> None:
    before = store_path(model, "kld", {})
    path = tree / "kvlocal" / "policies" / "ladder.py"
    path.rename(path.with_name("steps.py"))
    assert store_path(model, "kld", {}) != before


def test_a_library_is_read_once_in_a_process(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code.code_digest()
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **more: (opened.append(self), real(self, *args, **more))[1])
    code.code_digest()
    assert opened == []


def test_a_later_part_of_a_split_model_gives_another_record(tmp_path: Path, tree: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    before = store_path(parts[0], "kld", {})
    parts[1].write_bytes(b"GGUF2")
    assert store_path(parts[0], "kld", {}) != before


def key(name: str) -> dict[str, object]:
    return variant_key(Variant("mine", make_policy(name), Budget.parse("25%")))


def test_policies_of_the_package_are_covered_by_its_hash() -> None:
    assert key("ladder")["code"] == key("snapkv")["code"] == ""


@pytest.mark.parametrize(
    ("files", "edited"),
    [
        ({"one_file.py": ""}, "one_file.py"),
        ({"using.py": "import helper_of_mine", "helper_of_mine.py": None}, "helper_of_mine.py"),
        ({"using2.py": "def late():\n    from helper_two import x", "helper_two.py": None}, "helper_two.py"),
        ({"pack/__init__.py": None, "pack/mine.py": "", "pack/deep/scores.py": None}, "pack/deep/scores.py"),
    ],
)
def test_an_edited_plugin_gives_another_record(folder: Path, files: dict[str, str | None], edited: str) -> None:
    for file, more in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" if more is None else PLUGIN.format(more=more))
    importlib.invalidate_caches()
    where = next(file for file, more in files.items() if more is not None)
    name = where.removesuffix(".py").replace("/", ".") + ":Mine"
    before = key(name)
    assert before["code"] and key(name) == before
    flip(folder / edited, at=-2)
    assert key(name) != before


def test_a_base_class_in_another_file_counts(folder: Path) -> None:
    (folder / "base_of_mine.py").write_text(PLUGIN.format(more=""))
    (folder / "derived.py").write_text(
        "from dataclasses import dataclass\nimport base_of_mine\n\n@dataclass(frozen=True)\n"
        'class Mine(base_of_mine.Mine):\n    """Another."""\n'
    )
    importlib.invalidate_caches()
    before = key("derived:Mine")
    flip(folder / "base_of_mine.py")
    assert key("derived:Mine") != before


def record(**more: object) -> Record:
    values: dict[str, object] = {
        **{"metric": "needle", "task": "t", "case": "c", "policy": "ladder", "policy_args": {}, "storage": "f16"},
        **{"budget": "25%", "prefill": "exact", "guide": 0, "question": "", "held_mean": 1.0, "used_bytes": 1},
        **{"full_bytes": 4, "evict_s": 0.0, "measures": {"score": 1.0}},
    }
    return Record(**(values | more))  # type: ignore[arg-type]


def test_records_and_rows_say_which_commit_measured_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "records.jsonl")
    monkeypatch.setattr("kvlocal.eval.records.commit", lambda: "abc-dirty")
    store.put("1", record())
    monkeypatch.setattr("kvlocal.eval.records.commit", lambda: "def")
    store.put("2", record(case="d"))
    store.close()
    again = Store(tmp_path / "records.jsonl")
    found = [again.get("1"), again.get("2")]
    again.close()
    assert [r.commit for r in found if r is not None] == ["abc-dirty", "def"]
    assert [row["commit"] for row in rows([r for r in found if r is not None])] == ["abc-dirty, def"]


def test_the_commit_is_that_of_the_tree_and_the_version_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "kvlocal")
    (tmp_path / "kvlocal").mkdir()
    assert code.commit.__wrapped__() == kvlocal.__version__
    (tmp_path / "kvlocal" / "a.py").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    head = code.commit.__wrapped__()
    assert len(head) == 12
    (tmp_path / "kvlocal" / "a.py").write_text("2")
    assert code.commit.__wrapped__() == f"{head}-dirty"
