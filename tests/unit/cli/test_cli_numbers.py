"""Numbers that are none, or out of range, are one sentence on the command line, in the environment and in a file."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from fake_engine import Fake, call, install, sentence
from kvlocal_cli.main import main
from kvlocal_cli.options import twins

COMMANDS = {" ".join(path): command for path, command in twins.walk(main) if path}
NUMBERS = [
    pytest.param(name, param, id=f"{name}-{param.name}")
    for name, command in COMMANDS.items()
    for param in command.params
    if isinstance(param, click.Option) and isinstance(param.type, click.IntRange | click.FloatRange)
]
LISTS = [
    pytest.param(name, param, id=f"{name}-{param.name}")
    for name, command in COMMANDS.items()
    for param in command.params
    if isinstance(param, click.Option) and type(param.type).__name__ in ("Wholes", "Lengths", "Shares")
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


def wrong(param: click.Parameter) -> list[str]:
    """Texts that a number is not, the last ones too large for what holds it."""
    if isinstance(param.type, click.FloatRange):
        return ["nan", "-nan", "inf", "-inf", "1e400", "-1", "1e39", "x"]
    return ["4294967296", "4294967297", "-4294967297", "9" * 5000, "1.5", "1_0", "٣", "nan", "inf", "x"]


@pytest.mark.parametrize(("name", "param"), NUMBERS)
def test_every_number_has_a_range(fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str, param: click.Option) -> None:
    for text in wrong(param):
        said = sentence(*name.split(), f"{param.opts[-1]}={text}")
        assert said.startswith("Invalid value for '-") and len(said) < 300, text
    monkeypatch.setenv(str(param.envvar), wrong(param)[0])
    if not any(other.required for other in COMMANDS[name].params):
        assert sentence(*name.split()).startswith(f"Invalid value for {param.envvar}: {wrong(param)[0]}")


@pytest.mark.parametrize(("name", "param"), LISTS)
def test_so_has_every_list_of_numbers(fake: Fake, name: str, param: click.Option) -> None:
    for text in ("4294967297", "1,nan", "inf", "9" * 5000):
        assert sentence(*name.split(), f"{param.opts[-1]}={text}").startswith("Invalid value for '-")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.1", "1e39"])
@pytest.mark.parametrize("key", ["temp", "repeat-penalty", "top-p", "min-p"])
def test_a_file_is_held_to_it_too(fake: Fake, tmp_path: Path, key: str, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[run]\n{key} = {text}\n")
    said = sentence("--config", str(file), "run", "-p", "x")
    assert said.startswith(f"Invalid value for '{key}' in [run] of {file}: ") and "is not in the range" in said


@pytest.mark.parametrize("text", ["4294967297", "2147483648", "9" * 5000])
@pytest.mark.parametrize(
    "key", ["top-k", "ctx-size", "threads", "n-gpu-layers", "n-predict", "kv-tail", "kv-sink", "chunk"]
)
def test_a_whole_number_of_a_file_too(fake: Fake, tmp_path: Path, key: str, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[run]\n{key} = {text}\n")
    said = sentence("--config", str(file), "run", "-p", "x")
    assert str(file) in said and ("is not in the range" in said or "cannot be read" in said)


@pytest.mark.parametrize(
    ("arguments", "range"),
    [
        ("--temp nan", "nan is not in the range 0<=x<=100"),
        ("--top-p 0", "0.0 is not in the range 0<x<=1"),
        ("--top-k 4294967297", "4294967297 is not in the range 0<=x<=2147483647"),
        ("-t 513", "513 is not in the range 0<=x<=512"),
        ("-t 100000", "100000 is not in the range 0<=x<=512"),
        ("-ngl 2147483648", "2147483648 is not in the range 0<=x<=2147483647"),
        ("-b 4294967296", "4294967296 is not in the range 1<=x<=1073741824"),
        ("-n 9999999999", "9999999999 is not in the range -1<=x<=2147483647"),
        ("-s 4294967295", "4294967295 is not in the range -1<=x<=4294967294"),
    ],
)
def test_the_sentence_has_the_range(fake: Fake, arguments: str, range: str) -> None:
    assert f": {range}; see `kvlocal run --help`." in sentence("run", "-p", "x", *arguments.split())


def test_what_is_at_the_end_of_a_range_is_taken(fake: Fake) -> None:
    ends = "-t 512 -ngl 2147483647 --top-k 2147483647 --temp 100 --repeat-penalty 0.01 -s 4294967294 -n 2147483647"
    assert call("run", "-p", "x", *ends.split()).exit_code == 0
    assert (fake.settings.n_threads, fake.engine.sampling.seed) == (512, 2**32 - 2)


@pytest.mark.parametrize(
    "line", ["/set temp 1e30", "/set top-k 4294967297", "/set n-predict 4294967297", "/set temp nan"]
)
def test_so_is_what_a_chat_sets(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlocal_cli.commands import slash
    from kvlocal_cli.commands.conversation import Conversation

    from kvlocal.errors import UsageError
    from kvlocal.native.sampling import Sampling

    talk = Conversation.__new__(Conversation)
    talk.sampling, talk.n_predict = Sampling(), 5
    with pytest.raises(UsageError):
        slash.run(talk, f"/set {line}")
    assert (talk.sampling, talk.n_predict) == (Sampling(), 5)
