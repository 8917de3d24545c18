"""`kvlocal completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from kvlocal_cli.options.option import GroupedCommand


@click.command(cls=GroupedCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets a shell complete kvlocal.

    SHELL is bash, zsh or fish. Commands and options are completed, policies, storages, usual budgets, and GGUF files.
    Load the script when a shell starts:

    \b
    bash, in ~/.bashrc:    eval "$(kvlocal completion bash)"
    zsh, in ~/.zshrc:      eval "$(kvlocal completion zsh)"
    fish:                  kvlocal completion fish > ~/.config/fish/completions/kvlocal.fish
    """
    maker = get_completion_class(shell)
    assert maker is not None
    script = maker(ctx.find_root().command, {}, "kvlocal", "_KVLOCAL_COMPLETE").source()
    # click's for fish cuts a completion at its second comma, and lists have commas
    click.echo(script.replace('string split ","', 'string split --max 1 ","'))
