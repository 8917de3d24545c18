"""`kvlocal pull`: a model before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from kvlocal.errors import UsageError
from kvlocal_cli.backend import machine as backend
from kvlocal_cli.options.option import GroupedCommand


@click.command(cls=GroupedCommand)
@click.argument("spec", required=False, metavar="[SPEC]")
def pull(spec: str | None) -> None:
    """Fetch a model and print where it is.

    SPEC is USER/REPO or USER/REPO:FILE on Hugging Face, with or without hf: in front; FILE may be a quantization such
    as Q8_0. Without it, the default model is fetched. What is here already is not fetched again.

    \b
    kvlocal pull
    kvlocal pull USER/REPO:Q4_K_M
    """
    from kvlocal_cli.render.screen import Screen

    if spec is not None and Path(spec).is_file():
        raise UsageError(f"'{spec}' is a file that is here already; pull fetches USER/REPO[:FILE].")
    # as bytes: a path need not be text
    click.echo(os.fsencode(backend.fetch_model(spec, Screen())))
