"""What `kvlocal policies` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def policies_table(rows: Iterable[Any]) -> Table:
    """Name, what it does and where it comes from, parameters with their defaults."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    table.add_column("policy", overflow="fold", style="bold")
    table.add_column("what it does", ratio=4)
    table.add_column("parameters", ratio=3, overflow="fold")
    for row in rows:
        about = Text(str(row.summary))
        if row.paper:
            about.append(f"\n{row.paper}", "dim")
        parameters = " ".join(f"{each.name}={_default(each)}" for each in row.parameters)
        table.add_row(Text(str(row.name)), about, Text(parameters))
    return table


def parameters_table(rows: Iterable[Any]) -> Table:
    """What the parameters of all policies mean, each once."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold", style="bold")
    table.add_column("meaning", ratio=4)
    table.add_column("values", ratio=3, style="dim")
    # A dict keeps the order; a name with two meanings gets two rows.
    for name, help, allowed in dict.fromkeys((p.name, p.help, p.allowed) for row in rows for p in row.parameters):
        table.add_row(Text(name), Text(help), Text(allowed))
    return table


def _default(parameter: Any) -> str:
    return "none" if parameter.default is None else str(parameter.default)
