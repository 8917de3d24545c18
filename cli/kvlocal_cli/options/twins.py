"""The other names of an option: `--ctx-size` is KVLOCAL_CTX_SIZE in the environment and `ctx-size` in a file."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.core import ParameterSource

CONFIG = "KVLOCAL_CONFIG"
"""Names the configuration file, as `--config` does."""

Path = tuple[str, ...]
"""A command by its names below `kvlocal`, such as ``("eval", "kld")``."""


def key(param: click.Parameter) -> str | None:
    """The name of a parameter without dashes: the first long one of an option, `model` of MODEL; else None.

    None too for what has to be typed, such as --yes: no file or variable may answer for the user.
    """
    if getattr(param, "typed_only", False):
        return None
    if isinstance(param, click.Option):
        long = (name.removeprefix("--") for name in param.opts if name.startswith("--"))
        return None if param.is_eager else next(long, None)
    # what else is an argument says what a command is to work on, and has to be typed
    return "model" if param.name == "model" and not param.required else None


def name_twins(command: click.Command) -> None:
    """Give every option of a command, and of those below it, its variable, and name it on the help page."""
    for _, each in walk(command):
        for param in each.params:
            name = key(param)
            if name is not None and param.envvar is None:
                param.envvar = f"KVLOCAL_{name.upper().replace('-', '_')}"
                if isinstance(param, click.Option):
                    # not with show_envvar, which names the variable in errors that it has no part in
                    param.help = f"{param.help or ''}  [${param.envvar}]".lstrip()


def walk(command: click.Command, path: Path = ()) -> Iterator[tuple[Path, click.Command]]:
    """The command itself and all below it, by path."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from walk(below, (*path, name))


def asked_for(name: str) -> bool:
    """Whether a parameter was given for this run, on the command line or in the environment, not in a file."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def overruled(name: str, *, by: str) -> bool:
    """Whether of two parameters that exclude each other the second was given nearer to the command line."""
    order = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
    ctx = click.get_current_context()
    ours, theirs = (ctx.get_parameter_source(each) for each in (name, by))
    return theirs in order and (ours not in order or order.index(theirs) < order.index(ours))


def path_of(ctx: click.Context) -> Path:
    """The command that a context belongs to."""
    return () if ctx.parent is None else (*path_of(ctx.parent), str(ctx.info_name))
