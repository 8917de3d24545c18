"""Settings are declared once: options, variables, keys, keywords of Python and the table of the docs come from that."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
from kvlocal_cli.main import main
from kvlocal_cli.options import config_file, twins
from kvlocal_cli.options.option import GroupedOption
from kvlocal_cli.options.settings import SamplingSettings, Settings

from kvlocal import api, settings
from kvlocal.engine.config import EngineConfig
from kvlocal.errors import UsageError
from kvlocal.native.sampling import Sampling
from kvlocal.policies import make_policy
from kvlocal.setting import Real, Setting, Whole
from kvlocal.settings import SETTINGS
from kvlocal.storage.budget import Budget

REPO = Path(__file__).resolve().parents[2]
COMMANDS = {" ".join(path): command for path, command in twins.walk(main) if path}
BY_KEY = {setting.key: setting for setting in SETTINGS}


def options() -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of every command that has a variable."""
    for name, command in COMMANDS.items():
        yield from ((name, param) for param in command.params if twins.key(param) is not None)


def test_names_keys_variables_and_flags_are_unique() -> None:
    for part in ("name", "key", "variable"):
        values = [getattr(setting, part) for setting in SETTINGS]
        assert len(set(values)) == len(values)
    flags = [flag for setting in SETTINGS for flag in setting.flags]
    assert len(set(flags)) == len(flags)
    declared = [value for value in vars(settings).values() if isinstance(value, Setting)]
    assert declared == list(SETTINGS)


def test_every_option_with_the_name_of_a_setting_is_made_from_it() -> None:
    seen = set()
    for name, param in options():
        setting = BY_KEY.get(str(twins.key(param)))
        if setting is None or not isinstance(param, click.Option):
            continue
        assert isinstance(param, GroupedOption) and param.setting is setting, f"{name} {setting.key}"
        assert tuple(param.opts) == setting.flags and param.envvar == setting.variable
        seen.add(setting)
    assert seen == set(SETTINGS)


@pytest.mark.parametrize("name", ["run", "chat", "batch", "plan"])
def test_what_runs_has_the_defaults_and_the_help_of_the_settings(name: str) -> None:
    for param in COMMANDS[name].params:
        setting = getattr(param, "setting", None)
        if isinstance(setting, Setting) and setting is not settings.N_PREDICT:
            if setting.default is not None:
                assert param.get_default(click.Context(COMMANDS[name])) == setting.default
            if name == "run":
                assert param.help == f"{setting.help}  [${setting.variable}]"  # type: ignore[attr-defined]


def test_every_setting_is_a_key_of_the_configuration_file() -> None:
    keys = {key for command in COMMANDS.values() for key in config_file.keys(command)}
    assert set(BY_KEY) <= keys


def shape(param: click.Parameter) -> tuple[Any, ...]:
    """What a value has to look like; a list of what another command takes one of is no other meaning."""
    kind = param.type
    bounds = tuple(getattr(kind, name, None) for name in ("min", "max", "min_open", "exists", "file_okay", "dir_okay"))
    choices = tuple(getattr(kind, "choices", ()) or ())
    return (kind.name, bounds, choices, getattr(param, "multiple", False), getattr(param, "is_flag", False))


def test_a_variable_has_one_declaration() -> None:
    """Two commands share a variable only for one and the same setting, or for options that take the same."""
    by_variable: dict[str, list[tuple[str, click.Parameter]]] = {}
    for name, param in options():
        by_variable.setdefault(str(param.envvar), []).append((name, param))
    for variable, found in by_variable.items():
        first_name, first = found[0]
        for name, param in found[1:]:
            where = f"{variable}: {first_name}, {name}"
            if variable == settings.MODEL.variable:
                continue  # of batch an option, of the others an argument
            assert param.opts == first.opts, where
            setting = getattr(param, "setting", None)
            assert setting is getattr(first, "setting", None), where
            if setting is None or "list" not in (param.type.name, first.type.name):
                assert shape(param) == shape(first), where


def test_the_variables_of_old_that_meant_several_things_mean_one() -> None:
    commands: dict[str, set[str]] = {}
    for name, param in options():
        commands.setdefault(str(param.envvar), set()).add(name)
    assert commands["KVLOCAL_PROMPT"] == {"run", "kv-map"} and commands["KVLOCAL_N_PROMPT"] == {"plan", "bench"}
    assert commands["KVLOCAL_OUTPUT"] == {"batch"} and "bench" in commands["KVLOCAL_FORMAT"]
    assert commands["KVLOCAL_QUESTION"] == {"batch"} and commands["KVLOCAL_QUESTION_FILE"] == {"demo"}
    assert commands["KVLOCAL_DATA"] == {"eval summarize", "eval kv-retrieval"}


# --- Python --------------------------------------------------------------------------------------------------------


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: param.default for name, param in inspect.signature(function).parameters.items()}


def test_load_takes_every_setting_of_an_engine_with_its_default() -> None:
    taken = keywords(api.load)
    own = {"on_download": None}
    wanted = {setting.keyword: setting.default for setting in SETTINGS if setting.taker == "load"}
    # without one, the storage decides
    assert taken == wanted | own | {"policy": None}


def test_answers_take_the_settings_of_an_answer_with_their_defaults() -> None:
    for function in (api.LLM.generate, api.LLM.stream, api.Conversation.ask, api.Conversation.stream):
        taken = keywords(function)
        for setting in SETTINGS:
            if setting.taker == "answer" and setting.keyword in taken:
                assert taken[setting.keyword] == setting.default
    assert {"n_predict", "raw"} <= keywords(api.LLM.generate).keys() and "system" in keywords(api.LLM.chat)


def test_sampling_has_the_settings_of_sampling() -> None:
    wanted = {setting.name: setting.default for setting in SETTINGS if setting.taker == "sampling"}
    for kind in (Sampling, SamplingSettings):
        assert {field.name: field.default for field in fields(kind)} == wanted
    assert set(api.SamplingOptions.__annotations__) == set(wanted)


def test_configurations_have_the_defaults_of_the_settings() -> None:
    defaults = {setting.name: setting.default for setting in SETTINGS}
    for kind in (EngineConfig, Settings):
        for field in fields(kind):
            made = ("model", "policy", "policy_args", "budget", "storage", "retrieve_args", "archive")
            if field.name in defaults and field.name not in made:
                assert field.default == defaults[field.name], field.name
    assert (Settings().policy, Settings().budget, Settings().storage) == ("ladder", "2048", "f16")


def test_no_default_is_written_a_second_time() -> None:
    """In the signatures and classes above, a default is taken from the declaration."""
    for path, names in (
        ("kvlocal/api.py", {"load", "generate", "stream", "ask", "again"}),
        ("kvlocal/engine/config.py", {"EngineConfig"}),
        ("kvlocal/native/sampling.py", {"Sampling"}),
        ("cli/kvlocal_cli/options/settings.py", {"Settings", "SamplingSettings"}),
    ):
        known = {
            name for setting in SETTINGS for name in (setting.name, setting.keyword) if setting.default is not None
        }
        for node in ast.walk(ast.parse((REPO / path).read_text("utf-8"))):
            pairs: list[tuple[str, ast.expr | None]] = []
            if isinstance(node, ast.ClassDef) and node.name in names:
                pairs = [(n.target.id, n.value) for n in node.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]
            elif isinstance(node, ast.FunctionDef) and node.name in names:
                pairs = [(a.arg, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
            for name, value in pairs:
                if name in known and isinstance(value, ast.Constant):
                    assert name in ("policy", "archive") and value.value is None, f"{path}: {name} = {value.value!r}"


# --- the docs ------------------------------------------------------------------------------------------------------


def test_the_table_of_the_docs_has_a_row_for_every_setting(reference: ModuleType) -> None:
    text = (REPO / "docs" / "configuration.md").read_text("utf-8")
    assert reference.configuration(text) == text, f"run `{reference.COMMAND}`"
    rows = [line for line in text.splitlines() if line.startswith("| `-")]
    assert len(rows) == len(SETTINGS)
    for row, setting in zip(rows, SETTINGS, strict=True):
        for part in (*setting.flags, setting.variable, setting.key, setting.help.replace("|", "\\|")):
            assert part in row


# --- numbers and types ---------------------------------------------------------------------------------------------

NUMBERS = [setting for setting in SETTINGS if isinstance(setting, Whole | Real)]


def outside(setting: Setting) -> list[Any]:
    """Numbers that a setting refuses."""
    if isinstance(setting, Whole):
        return [setting.low - 1, setting.high + 1, 2**32 + 1, 2**64 + 1]
    assert isinstance(setting, Real)
    low = setting.low if setting.above else setting.low - 0.001
    return [float("nan"), float("inf"), float("-inf"), low, setting.high * 1.01, 1e300]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_numbers_out_of_range_and_what_is_no_number_are_refused_with_the_range(setting: Any) -> None:
    for value in [*outside(setting), "5", [], True, *([1.5, 2.0] if isinstance(setting, Whole) else [1j])]:
        with pytest.raises(UsageError, match=re.escape(f"; give {setting.allowed}.")) as error:
            setting.check(value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert f"{setting.high:g}" in setting.allowed or str(setting.high) in setting.allowed
    assert setting.check(setting.high) == setting.high
    if setting.default is not None:
        assert setting.check(setting.default) == setting.default
        with pytest.raises(UsageError):
            setting.check(None)


def test_numbers_of_numpy_become_those_of_python() -> None:
    sampling = Sampling(temp=np.float32(0.5), top_k=np.int64(3), seed=np.int32(7))  # type: ignore[arg-type]
    assert [type(value) for value in (sampling.temp, sampling.top_k, sampling.seed)] == [float, int, int]
    assert sampling == Sampling(temp=0.5, top_k=3, seed=7)


@pytest.mark.parametrize(
    "values",
    [
        {"temp": float("nan")},
        {"temp": float("inf")},
        {"temp": -1},
        {"temp": "hot"},
        {"repeat_penalty": float("inf")},
        {"repeat_penalty": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": float("nan")},
        {"top_k": 2**32 + 1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": None},
        {"seed": 2**32 - 1},
        {"seed": -2},
        {"ignore_eos": 1},
    ],
)
def test_sampling_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="; give "):
        Sampling(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"n_threads": 513},
        {"n_threads": 2**32 + 1},
        {"n_threads": "2"},
        {"n_gpu_layers": 2**31},
        {"n_gpu_layers": -1},
        {"n_batch": 0},
        {"n_batch": 2**31},
        {"n_ubatch": 2**40},
        {"n_ctx": 2**31},
        {"n_ctx": None},
        {"chunk": True},
        {"evict_every": 0.5},
        {"prefill": "maybe"},
        {"prefill": []},
        {"kernels": True},
        {"n_seq_max": 257},
        {"n_pool": 2**31},
    ],
)
def test_an_engine_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="; give "):
        EngineConfig(Path("m.gguf"), make_policy("full"), Budget.parse("100%"), **values)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"model": b"m.gguf"}, "model"),
        ({"policy": 5}, "policy"),
        ({"policy_args": ["window=3"]}, "policy_args"),
        ({"budget": 0.25}, "budget"),
        ({"budget": None}, "budget"),
        ({"budget": True}, "budget"),
        ({"kv": None}, "kv"),
        ({"kv_tail": "8", "kv": "q4"}, "kv_tail"),
        ({"n_ctx": "4096"}, "n_ctx"),
        ({"n_threads": 1000}, "n_threads"),
        ({"n_gpu_layers": 2**32}, "n_gpu_layers"),
        ({"kernels": "cuda"}, "kernels"),
        ({"prefill": "slow"}, "prefill"),
        ({"guide": None}, "guide"),
    ],
)
def test_load_refuses_before_it_looks_for_a_model(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], name: str
) -> None:
    def resolve(*_: Any, **__: Any) -> Path:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(api, "resolve_model", resolve)
    with pytest.raises(UsageError, match=f"^{name} is .*; give "):
        api.load(**values)


class Untouched:
    """An engine that must not be reached, save to wait for one's turn."""

    lock = nullcontext()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the engine's {name} was reached")


@pytest.mark.parametrize(
    ("prompt", "values", "name"),
    [
        (None, {}, "The prompt"),
        (5, {}, "The prompt"),
        (b"Hello", {}, "The prompt"),
        (["Hello"], {}, "Message 1"),
        ("Hello", {"n_predict": "5"}, "n_predict"),
        ("Hello", {"n_predict": None}, "n_predict"),
        ("Hello", {"n_predict": 2**31}, "n_predict"),
        ("Hello", {"n_predict": -2}, "n_predict"),
        ("Hello", {"seed": None}, "seed"),
        ("Hello", {"temp": "0"}, "The temperature"),
        ("Hello", {"raw": "yes"}, "raw"),
    ],
)
def test_an_answer_refuses_before_anything_is_forgotten(prompt: Any, values: dict[str, Any], name: str) -> None:
    llm = api.LLM(Untouched())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"^{name} (is|has) .*; give "):
        llm.generate(prompt, **values)


def test_a_conversation_refuses_what_is_no_text() -> None:
    llm = api.LLM(Untouched())  # type: ignore[arg-type]
    for arguments in ({"system": 5}, {"session": 5}, {"session": ""}):
        with pytest.raises(UsageError, match="; give "):
            llm.chat(**arguments)  # type: ignore[arg-type]
    talk = api.Conversation(Untouched())  # type: ignore[arg-type]
    for call in (
        lambda: talk.ask(None),  # type: ignore[arg-type]
        lambda: talk.ask("Hello", n_predict="5"),  # type: ignore[arg-type]
        lambda: talk.again(seed=None),  # type: ignore[typeddict-item]
        lambda: talk.save(None),  # type: ignore[arg-type]
        lambda: talk.load(""),
    ):
        with pytest.raises(UsageError, match="; give "):
            call()
