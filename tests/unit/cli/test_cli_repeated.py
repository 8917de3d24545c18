"""An option that is typed twice: all values are used, or it is refused; never is one dropped without a word."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from fake_engine import Fake, call, install, sentence
from kvlocal_cli.main import main
from kvlocal_cli.options import twins

OPTIONS = [
    pytest.param(path, option, id=" ".join([*path, option.opts[-1]]))
    for path, command in twins.walk(main)
    for option in command.params
    if isinstance(option, click.Option) and not option.is_eager
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


@pytest.mark.parametrize(("path", "option"), OPTIONS)
def test_every_option_is_used_or_refused(fake: Fake, path: tuple[str, ...], option: click.Option) -> None:
    if option.multiple or (option.is_flag and not option.secondary_opts):
        return
    both = [*option.opts, *option.secondary_opts]
    first, second = (both[0], both[-1]) if option.is_flag else (f"{option.opts[-1]}=1", f"{option.opts[-1]}=2")
    after = [*path, first, second] if path else [first, second, "run"]
    assert sentence(*after) == f"{' / '.join(both)} is given 2 times, and takes one value; give it once."


def test_other_spellings_count_as_the_same(fake: Fake) -> None:
    for arguments in ("-c 64 --ctx-size 64", "-c 64 -p x -c=64", "--stream --no-stream", "-n 1 -n 1 -n 1"):
        assert "times, and takes one value; give it once." in sentence("run", *arguments.split())
    assert fake.engines == []


def test_a_flag_may_be_typed_twice(fake: Fake) -> None:
    assert call("run", "-p", "x", "--json", "--json").exit_code == 0


def test_run_reads_all_files_in_order(fake: Fake, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text {name}\n")
    files = ["-f", str(tmp_path / "b"), "-f", "-", "--file", str(tmp_path / "a")]
    call("run", *files, "-p", "Which?", stdin="piped\n")
    assert fake.engine.messages[-1]["content"] == "text b\n\npiped\n\ntext a\n\nWhich?"
    assert "standard input can be read once" in sentence("run", "-f", "-", "-f", "-", stdin="x")
    assert "there is no file" in sentence("run", "-f", str(tmp_path / "a"), "-f", str(tmp_path / "none"))


def test_files_of_the_environment_and_of_a_file(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a b", tmp_path / "c"
    first.write_text("one")
    second.write_text("two")
    monkeypatch.setenv("KVLOCAL_FILE", f"{first}:{second}")
    call("run")
    assert fake.engine.messages[-1]["content"] == "one\n\ntwo"
    config = tmp_path / "config.toml"
    config.write_text(f'[run]\nfile = ["{second}", "{first}"]\n')
    monkeypatch.delenv("KVLOCAL_FILE")
    call("--config", str(config), "run")
    assert fake.engine.messages[-1]["content"] == "two\n\none"
