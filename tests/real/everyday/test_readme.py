"""Every command of the README, as a newcomer types it, top to bottom, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from needles import GATE, LANTERN, MILL, document
from processes import TIMEOUT_S, environment

REPO = Path(__file__).resolve().parents[3]
README = (REPO / "README.md").read_text("utf-8")
BUILDS = ("make demo", "make test")
"""What runs this test."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.M | re.S)


def commands() -> Iterator[str]:
    for block in blocks("console"):
        for line in block.splitlines():
            assert line.startswith("$ "), f"not a command: {line}"
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if shlex.join(words) not in BUILDS:
                yield shlex.join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, default_path: Path) -> Path:
    """Files by the names that the README uses."""
    out = tmp_path_factory.mktemp("newcomer")
    shutil.copy(tiny_path, out / "model.gguf")
    text = document(LANTERN, GATE, MILL)
    (out / "report.txt").write_text(text, "utf-8")
    (out / "book.txt").write_text(" ".join([text] * 4), "utf-8")
    (out / "novel.txt").write_text(" ".join(document(LANTERN, GATE, MILL) for _ in range(40)), "utf-8")
    (out / "articles").mkdir()
    for i, sentence in enumerate((LANTERN.sentence, GATE.sentence, MILL.sentence)):
        (out / "articles" / f"{i}.txt").write_text(f"{sentence} {text[:600]}", "utf-8")
    return out


def test_the_readme_has_commands() -> None:
    found = list(commands())
    assert len(found) >= 10 and len(set(found)) == len(found)


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_of_the_readme(command: str, folder: Path) -> None:
    name, *arguments = shlex.split(command)
    assert name == "kvlocal", f"what this test does not run: {command}"
    done = subprocess.run(
        [sys.executable, "-m", "kvlocal", *arguments],
        cwd=folder,
        env=environment(),
        # somebody types into a chat; run would take a pipe for its document
        input=b"What is in the report?\n" if arguments[0] == "chat" else None,
        stdin=None if arguments[0] == "chat" else subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    for word in arguments:
        if word.endswith((".svg", ".json", ".jsonl", ".kvl", ".md")):
            assert (folder / word).stat().st_size > 0, f"{word} was not written"


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_of_the_readme(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip()
