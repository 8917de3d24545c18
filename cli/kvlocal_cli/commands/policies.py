"""`kvlocal policies`: what --policy and --policy-arg take."""

from __future__ import annotations

import click

from kvlocal_cli.backend import engine as backend
from kvlocal_cli.options.option import GroupedCommand


@click.command(cls=GroupedCommand)
def policies() -> None:
    """List the policies, their parameters and papers.

    \b
    kvlocal policies
    kvlocal run --policy snapkv --policy-arg window=64 -p "Hello"
    """
    from kvlocal_cli.render.policies import parameters_table, policies_table
    from kvlocal_cli.render.screen import out

    rows = backend.describe_policies()
    out(policies_table(rows), parameters_table(rows))
