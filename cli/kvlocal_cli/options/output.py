"""Options that say what is printed, and where to."""

from __future__ import annotations

from pathlib import Path

import click

from kvlocal_cli.options.option import Callback, option, stack


def json_option(command: Callback) -> Callback:
    """--json, as `as_json`."""
    return option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def table_options(command: Callback) -> Callback:
    """--format, --output-file and --plot of what measures, as `form`, `output_file` and `plot`."""
    forms = click.Choice(["md", "json", "csv"])
    path = click.Path(path_type=Path)
    return stack(
        option("Output", "-o", "--format", "form", type=forms, default="md", help="The form of what is printed."),
        option("Output", "--output-file", type=path, metavar="FILE", help="Not to standard output."),
        option("Output", "--plot", type=path, metavar="FILE", help="Draw it too: FILE.svg or FILE.png."),
    )(command)
