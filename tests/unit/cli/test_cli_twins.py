"""Every option has a variable and a key of the configuration file, and they take effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.core import ParameterSource
from fake_engine import Fake, call, install, sentence
from kvlocal_cli.main import main
from kvlocal_cli.options import config_file, twins

COMMANDS = {" ".join(path): command for path, command in twins.walk(main) if path}
OPTIONS = [
    pytest.param(name, option, id=f"{name}-{option.name}")
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option) and twins.key(option) is not None
]

ROOT = click.Context(main, info_name="kvlocal", **main.context_settings)

DIRECT = {"KVLOCAL_CACHE"}
"""Variables that are read without an option."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


def other_than_default(param: click.Parameter) -> str:
    """A value that the parameter takes and does not have by itself."""
    kind = param.type
    if isinstance(kind, click.types.BoolParamType):
        return "0" if param.default is True else "1"
    if isinstance(kind, click.Choice):
        return next(choice for choice in kind.choices if choice != param.default)
    if isinstance(kind, click.types.IntParamType):
        return "7"
    if isinstance(kind, click.types.FloatParamType):
        return "0.5"
    if isinstance(kind, click.Path) and kind.exists:
        return os.devnull if kind.file_okay else os.curdir
    if kind.name == "list":
        return getattr(kind, "choices", ())[-1] if getattr(kind, "choices", ()) else "1"
    return "name=value"


def context(name: str, values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> click.Context:
    """The command parsed with these variables and nothing on its command line."""
    command = COMMANDS[name]
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    required = [param for param in command.params if isinstance(param, click.Argument) and param.required]
    return command.make_context(name, [other_than_default(param) for param in required], parent=ROOT)


def needed(name: str) -> dict[str, str]:
    """Variables for what a command cannot do without."""
    options = (param for param in COMMANDS[name].params if isinstance(param, click.Option) and param.required)
    return {str(option.envvar): other_than_default(option) for option in options}


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_has_a_variable_that_takes_effect(
    monkeypatch: pytest.MonkeyPatch, name: str, option: click.Option
) -> None:
    long = next(opt for opt in option.opts if opt.startswith("--"))
    variable = "KVLOCAL_" + long.removeprefix("--").replace("-", "_").upper()
    assert option.envvar == variable and variable not in DIRECT
    assert option.name is not None
    before = None if option.required else context(name, needed(name), monkeypatch).params[option.name]
    ctx = context(name, needed(name) | {variable: other_than_default(option)}, monkeypatch)
    assert ctx.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT
    assert ctx.params[option.name] != before


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_help_page_names_the_variables(name: str, option: click.Option) -> None:
    assert f"[${option.envvar}]" in call(*name.split(), "--help").stdout


def keyed() -> Iterator[Any]:
    for name, command in COMMANDS.items():
        for key, param in config_file.keys(command).items():
            yield pytest.param(name, key, param, id=f"{name}-{key}")


@pytest.mark.parametrize(("name", "key", "param"), list(keyed()))
@pytest.mark.parametrize("table", ["own", "defaults"])
def test_every_option_is_a_key_that_takes_effect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: str, name: str, key: str, param: click.Parameter
) -> None:
    path = tuple(name.split())
    text = other_than_default(param)
    value = f'"{text}"'
    if isinstance(param.type, click.types.BoolParamType):
        value = "true" if text == "1" else "false"
    elif isinstance(param.type, click.types.IntParamType | click.types.FloatParamType):
        value = text
    elif isinstance(param, click.Option) and param.multiple:
        value = f"[{value}]"
    file = tmp_path / "config.toml"
    file.write_text(f"[{name.replace(' ', '.') if table == 'own' else table}]\n{key} = {value}\n")
    try:
        defaults = config_file.read(file, main).default_map()
    except config_file.UsageError as error:
        # one option of another command has the same name and takes something else
        assert table == "defaults" and "to `kvlocal" in str(error)
        return
    for part in path:
        defaults = defaults[part]
    for variable, given in needed(name).items():
        if variable != param.envvar:
            monkeypatch.setenv(variable, given)
    arguments = [p for p in COMMANDS[name].params if isinstance(p, click.Argument) and p.required]
    typed = [other_than_default(p) for p in arguments]
    ctx = COMMANDS[name].make_context(name, list(typed), parent=ROOT, default_map=defaults)
    assert param.name is not None and ctx.get_parameter_source(param.name) is ParameterSource.DEFAULT_MAP
    monkeypatch.setenv(str(param.envvar), text)
    from_environment = COMMANDS[name].make_context(name, typed, parent=ROOT)
    assert ctx.params[param.name] == from_environment.params[param.name]


@pytest.mark.parametrize(("text", "raw"), [("1", True), ("true", True), ("yes", True), ("0", False), ("no", False)])
def test_flags_take_words_for_yes_and_no(fake: Fake, monkeypatch: pytest.MonkeyPatch, text: str, raw: bool) -> None:
    monkeypatch.setenv("KVLOCAL_NO_CHAT_TEMPLATE", text)
    call("run", "-p", "x")
    assert (fake.engine.raw is not None) is raw
    monkeypatch.setenv("KVLOCAL_STREAM", "perhaps")
    assert sentence("run", "-p", "x").startswith("Invalid value for KVLOCAL_STREAM: 'perhaps' is not a valid boolean")


def test_a_variable_may_hold_several_values(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_POLICY_ARG", "kernel=5 pool=avg")
    call("run", "-p", "x", "--policy", "snapkv")
    assert fake.settings.policy_args == {"kernel": "5", "pool": "avg"}


def test_an_empty_variable_is_none(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_BUDGET", "")
    call("run", "-p", "x")
    assert fake.settings.budget == "2048"


def test_the_policy_of_the_environment_is_a_choice(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_KV", "q4")
    call("run", "-p", "x")
    assert (fake.settings.storage, fake.settings.policy) == ("q4", "ada-snapkv")
    monkeypatch.setenv("KVLOCAL_POLICY", "streaming")
    call("run", "-p", "x")
    assert fake.settings.policy == "streaming"


def test_the_command_line_beats_the_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUDGET": "25%", "HF": "someone/model", "KV_WINDOW": "8"}.items():
        monkeypatch.setenv(f"KVLOCAL_{name}", value)
    call("run", "my.gguf", "-p", "x", "--budget", "64", "--policy-arg", "window=16")
    assert (fake.settings.model, fake.settings.budget) == ("my.gguf", "64")
    assert fake.settings.policy_args == {"window": "16"}
    monkeypatch.setenv("KVLOCAL_MODEL", "other.gguf")
    assert "two models are named" in sentence("run", "-p", "x")
    call("run", "-hf", "third/model", "-p", "x")
    assert fake.settings.model == "hf:third/model"


def test_a_value_that_cannot_be_taken_is_blamed_on_its_variable(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_CTX_SIZE", "big")
    assert sentence("run", "-p", "x") == (
        "Invalid value for KVLOCAL_CTX_SIZE: 'big' is not a valid whole number; see `kvlocal run --help`."
    )
    assert call("run", "-p", "x", "-c", "64").exit_code == 0


def test_a_chunk_of_the_environment_wants_chunked_prefill_too(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_CHUNK", "64")
    assert sentence("run", "-p", "x").startswith("--chunk has no effect")
    monkeypatch.setenv("KVLOCAL_PREFILL", "chunked")
    call("run", "-p", "x")
    assert (fake.settings.prefill, fake.settings.chunk) == ("chunked", 64)
