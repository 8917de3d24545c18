"""`kvlocal config`: the configuration file, and what holds because of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from kvlocal.errors import UsageError
from kvlocal_cli.options import config_file, twins
from kvlocal_cli.options.option import GroupedGroup

EXAMPLE = """\
# kvlocal's configuration. A key is the long name of an option without its dashes, and holds where neither the command
# line nor the environment (KVLOCAL_CTX_SIZE, …) says otherwise. `kvlocal COMMAND --help` lists the options,
# `kvlocal config` shows what this file does.

# for every command that has the option
[defaults]
# model = "/models/Llama-3.2-3B-Instruct-Q4_K_M.gguf"
# threads = 4
# ctx-size = 8192

# for one command, instead of what stands above
[run]
# budget = "25%"
# temp = 0.2

[chat]
# budget = 2048
# system-prompt = "Answer in one sentence."

[bench]
# depth = [0, 4096]
# policy = ["full", "paged", "ladder"]

# for every evaluation, and for one of them
[eval]
# budget = ["50%", "25%"]

[eval.needle]
# lengths = [1024, 2048]
"""


@click.group(cls=GroupedGroup, invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Show the configuration file and what is set.

    Lists every option that the file or an environment variable sets, the value that holds, where it comes from, and
    for which commands. The command line overrides both, the environment the file, a command's own table [defaults].

    \b
    kvlocal config
    kvlocal --config other.toml config
    KVLOCAL_BUDGET=25% kvlocal config
    """
    if ctx.invoked_subcommand is not None:
        return
    from kvlocal_cli.render.config import settings_table
    from kvlocal_cli.render.screen import out

    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    path = _path(root)
    there = path.exists()
    file = config_file.read(path, root.command) if there else config_file.ConfigFile()
    rows = _merged(_values(root.command, file))
    click.echo(f"{path}{'' if there else ' (not there; `kvlocal config init` writes an example)'}")
    if rows:
        out(settings_table(rows))
    else:
        click.echo("Nothing is set.")


@config.command()
@click.pass_context
def init(ctx: click.Context) -> None:
    """Write an example in which everything is commented out.

    It goes where the file is looked for: the user's configuration folder, or what --config or KVLOCAL_CONFIG names.
    A file that is there is left alone.

    \b
    kvlocal config init
    kvlocal --config project.toml config init
    """
    path = _path(ctx.find_root())
    if path.exists():
        raise UsageError(f"'{path}' is there already; edit it, or remove it first.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}.") from None
    click.echo(str(path))


def _path(root: click.Context) -> Path:
    given: Path | None = root.params["config"]
    return config_file.default_path() if given is None else given.expanduser()


Row = tuple[str, str, str, str]
"""Option, value, where it comes from, command."""


def _values(root: click.Group, file: config_file.ConfigFile) -> Iterator[Row]:
    for path, command in twins.walk(root):
        ctx = click.Context(command)
        entries = file.entries.get(path, {})
        for key, param in config_file.keys(command).items() if path else ():
            variable = str(param.envvar)
            entry = entries.get(param.name or key)
            if os.environ.get(variable):
                yield key, os.environ[variable], variable, " ".join(path)
            elif entry is not None:
                try:
                    param.type_cast_value(ctx, entry.value)
                except click.BadParameter as error:
                    raise UsageError(f"{file.hint(path, param.name or key)}: {error.message}") from None
                yield key, _text(entry.value), f"[{entry.table}]", " ".join(path)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(value) if isinstance(value, list) else str(value)


def _merged(rows: Iterable[Row]) -> list[Row]:
    """One row for all commands that have the same value from the same place."""
    commands: dict[tuple[str, str, str], list[str]] = {}
    for key, value, source, command in rows:
        commands.setdefault((key, value, source), []).append(command)
    return [(*what, _short(names)) for what, names in sorted(commands.items())]


def _short(names: list[str]) -> str:
    """`run, eval kld needle` for run, eval kld and eval needle."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group, _, command = name.partition(" ")
        groups.setdefault(group, []).append(command)
    return ", ".join(" ".join([group, *filter(None, below)]) for group, below in groups.items())
