"""The pages of docs/reference are what the commands say now."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from kvlocal_cli.main import main

REPO = Path(__file__).resolve().parents[2]


def test_every_command_has_its_page_as_it_is_now(reference: ModuleType) -> None:
    there = {path.name: path.read_text("utf-8") for path in (REPO / "docs" / "reference").glob("*.md")}
    wanted = reference.pages()
    assert set(wanted) == {"index.md", *(f"{name}.md" for name in main.commands)}
    assert sorted(there) == sorted(wanted), f"run `{reference.COMMAND}`"
    for name, text in wanted.items():
        assert there[name] == text, f"{name} is out of date: run `{reference.COMMAND}`"


def test_pages_have_the_commands_below_a_group_and_do_not_depend_on_the_terminal(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reference.pages()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("KVLOCAL_BUDGET", "7")
    assert reference.pages() == before
    assert "\n## kvlocal eval kld\n\n```text\nUsage: kvlocal eval kld [OPTIONS] [MODEL]\n" in before["eval.md"]
    assert "| [`kvlocal run`](run.md) | Answer one prompt. |" in before["index.md"]


def test_the_navigation_has_every_page(reference: ModuleType) -> None:
    config = SimpleNamespace(nav=[{"Home": "index.md"}, {"Commands": ["reference/index.md"]}])
    reference.on_config(config)
    assert config.nav[0] == {"Home": "index.md"}
    first, *others = config.nav[1]["Commands"]
    assert first == "reference/index.md" and {"run": "reference/run.md"} in others
    assert len(others) == len(main.commands)


def test_the_page_of_architectures_is_what_its_table_says(reference: ModuleType) -> None:
    page = (REPO / "docs" / "architectures.md").read_text("utf-8")
    assert page == reference.architectures(), f"run `{reference.COMMAND}`"
