"""The ``kvlocal`` command: the group, and the one place where a failure becomes a sentence and an exit code."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import click

from kvlocal.errors import KVError
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.commands.batch import batch
from kvlocal_cli.commands.bench import bench
from kvlocal_cli.commands.chat import chat
from kvlocal_cli.commands.completion import completion
from kvlocal_cli.commands.config import config
from kvlocal_cli.commands.demo import demo
from kvlocal_cli.commands.doctor import doctor
from kvlocal_cli.commands.eval import evaluate
from kvlocal_cli.commands.kv_map import kv_map
from kvlocal_cli.commands.models import models
from kvlocal_cli.commands.plan import plan
from kvlocal_cli.commands.policies import policies
from kvlocal_cli.commands.pull import pull
from kvlocal_cli.commands.run import run
from kvlocal_cli.options import config_file, twins
from kvlocal_cli.options.option import GroupedGroup
from kvlocal_cli.render.controls import plain
from kvlocal_cli.terminal.interrupt import INTERRUPTED


class Cli(GroupedGroup):
    """A group that ends every failure with one sentence on stderr and an exit code, without a traceback."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        twins.name_twins(cmd)
        super().add_command(cmd, name)

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.get("standalone_mode", True)
        extra["standalone_mode"] = False
        if not standalone:
            return super().main(*args, **extra)
        try:
            # Without standalone mode click returns the code of `ctx.exit()`; commands themselves return None.
            code = super().main(*args, **extra) or 0
        except KVError as error:
            code = fail(str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            code = error.exit_code
        except click.UsageError as error:
            code = fail(f"{error.format_message().rstrip('.')}; see `{_command_path(error)} --help`.", error.exit_code)
        except click.ClickException as error:
            code = fail(error.format_message(), error.exit_code)
        except click.Abort:  # click turns Ctrl-C into this
            code = INTERRUPTED
        except MemoryError:
            code = fail("out of memory; a smaller --budget, --ctx-size or model needs less.", 1)
        except OSError as error:
            code = fail(str(error), 1)
        sys.exit(code)


def fail(sentence: str, code: int) -> int:
    """Print `Error: sentence` on stderr as one line and return the exit code."""
    text = plain(" ".join(sentence.split()))
    # the terminal may be gone
    with contextlib.suppress(OSError):
        click.echo(f"Error: {text}{'' if text.endswith(('.', '?', '!')) else '.'}", err=True)
    return code


def _command_path(error: click.UsageError) -> str:
    return error.ctx.command_path if error.ctx else "kvlocal"


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        version, build = backend.versions()
        click.echo(f"kvlocal {version} (llama.cpp {build['llama_cpp_commit']}, KVL ABI {build['abi_version']})")
        ctx.exit()


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of kvlocal, llama.cpp and the KVL ABI.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar=twins.CONFIG,
    metavar="FILE",
    help=f"Configuration file instead of the user's own (see `kvlocal config`).  [${twins.CONFIG}]",
)
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """Local LLMs with a KV cache that stays as small as you say.

    A policy chooses which tokens the cache keeps, a budget says how many.

    \b
    kvlocal run -f report.txt -p "Who signed it?" --budget 25%
    kvlocal chat --policy ladder --budget 2048
    kvlocal policies

    Every option has a variable too (KVLOCAL_BUDGET for --budget), and a key in the configuration file.
    """
    # Text of a model can hold what a terminal's encoding lacks; a question mark is better than a dead process.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # these two have to work with a broken file as well
    if ctx.invoked_subcommand not in ("config", "completion"):
        assert isinstance(ctx.command, click.Group)
        file = config_file.read(config.expanduser() if config else None, ctx.command)
        ctx.meta[config_file.META] = file
        ctx.default_map = file.default_map()


for command in (
    *(run, chat, batch, plan, bench, evaluate, kv_map),
    *(policies, pull, models, config, completion, doctor, demo),
):
    main.add_command(command)
