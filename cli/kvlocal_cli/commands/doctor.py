"""`kvlocal doctor`: what a bug report needs."""

from __future__ import annotations

import json

import click

from kvlocal_cli.backend import machine as backend
from kvlocal_cli.options.option import GroupedCommand
from kvlocal_cli.options.output import json_option
from kvlocal_cli.options.settings import Settings, model_options
from kvlocal_cli.render.controls import plain_json


@click.command(cls=GroupedCommand)
@model_options
@json_option
def doctor(settings: Settings, as_json: bool) -> None:
    """Look for what is wrong here, for a bug report.

    Says what is installed and what it runs on, then computes for a second: logits of a tiny random model with the page
    kernels against llama.cpp's own operators (they may differ by 2e-4 of the range of the logits: f32 sums in another
    order), decoded rows of every storage format against plain loops (not at all), attention over them against f64
    (2e-5 of the largest output). Of every device it says whether page kernels read what lies there, and whether they
    were tested on hardware. Of MODEL, or the default one if it is on disk, it says whether it can be paged, on which
    devices, and how its heads can be stored.

    Exit code: 0 if all passed, 1 if something failed. Warnings do not count.

    \b
    kvlocal doctor
    kvlocal doctor model.gguf -ngl 99 --json
    """
    from kvlocal_cli.render.doctor import show_report
    from kvlocal_cli.render.screen import Screen

    report = backend.examine(settings, Screen())
    if as_json:
        click.echo(plain_json(json.dumps(report, ensure_ascii=False, allow_nan=False)))
    else:
        show_report(report)
    if not report["ok"]:
        raise click.exceptions.Exit(1)
