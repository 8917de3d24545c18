"""`kvlocal models`: the models on disk, where they are, and away with them."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from kvlocal.errors import UsageError
from kvlocal_cli.backend import machine as backend
from kvlocal_cli.options.option import GroupedGroup, option
from kvlocal_cli.options.output import json_option
from kvlocal_cli.render.controls import plain, plain_json

if TYPE_CHECKING:
    from kvlocal.models.listing import ModelFile


_spec_argument = click.argument("spec", metavar="SPEC")


@click.group(cls=GroupedGroup, invoke_without_command=True)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models on disk.

    These are the GGUF files in kvlocal's own cache and in that of the Hugging Face hub: name, size, quantization,
    architecture, the day it was last read, and path.

    \b
    kvlocal models
    kvlocal models path USER/REPO:Q4_K_M
    kvlocal models rm random-llama-1b-a1be07f3.gguf
    """
    ctx.obj = as_json
    if ctx.invoked_subcommand is not None:
        return
    found = backend.list_models()
    if as_json:
        _print_json({"models": [_as_dict(model) for model in found], "caches": backend.model_caches()})
    elif found:
        from kvlocal_cli.render.models import models_text
        from kvlocal_cli.render.screen import out_width

        click.echo(models_text(found, out_width() if sys.stdout.isatty() else None))
    else:
        click.echo("There are no models here yet; `kvlocal pull` fetches the default one.", err=True)


@models.command()
@_spec_argument
@json_option
@click.pass_obj
def path(all_json: bool, spec: str, as_json: bool) -> None:
    """Print the path of a model on disk.

    SPEC is a name or path as `kvlocal models` lists it; of the hub also USER/REPO or USER/REPO:QUANT. Nothing is
    fetched.

    \b
    kvlocal models path SmolLM2-135M-Instruct.Q4_1.gguf
    """
    model = backend.find_model_file(spec)
    if as_json or all_json:
        _print_json(_as_dict(model))
    else:
        # a path need not be text
        click.echo(plain(str(model.path)) if sys.stdout.isatty() else os.fsencode(model.path))


@models.command()
@_spec_argument
@option("Options", "-y", "--yes", is_flag=True, typed_only=True, help="Do not ask.")
@json_option
@click.pass_obj
def rm(all_json: bool, spec: str, yes: bool, as_json: bool) -> None:
    """Remove a model from its cache.

    SPEC is as for `kvlocal models path`. All parts of a split model go, and nothing outside the two caches.

    \b
    kvlocal models rm USER/REPO:Q4_K_M --yes
    """
    from kvlocal_cli.render.numbers import size

    model = backend.find_model_file(spec)
    question = f"Remove {model.name} ({size(model.size_bytes)}, {model.path})?"
    if not yes and not confirm(plain(question), "removes"):
        click.echo("Nothing was removed.", err=True)
        raise click.exceptions.Exit(1)
    freed = backend.remove_model(model)
    if as_json or all_json:
        _print_json({"name": model.name, "files": [str(file) for file in model.files], "freed_bytes": freed})
    else:
        click.echo(plain(f"Removed {model.name}: {size(freed)} are free."), err=True)


def confirm(question: str, does: str) -> bool:
    """Ask on standard error.

    Raises:
        UsageError: nobody answers; ``does`` is what --yes does without asking.
    """
    click.echo(f"{question} [y/N] ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not answer:
        click.echo(err=True)
        raise UsageError(f"nobody answered; --yes {does} without asking.")
    return answer.strip().lower() in ("y", "yes")


def _print_json(values: Any) -> None:
    click.echo(plain_json(json.dumps(values, ensure_ascii=False, allow_nan=False)))


def _as_dict(model: ModelFile) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "cache": model.cache,
        "files": [str(file) for file in model.files],
        "size_bytes": model.size_bytes,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.last_used)),
        "is_default": model.is_default,
    }
