"""What the configuration sets, drawn."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text


def settings_table(rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """Option, value, where it comes from, commands."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("option", "value", "from", "commands"):
        table.add_column(title, overflow="fold")
    for row in rows:
        # as text: brackets are no markup
        table.add_row(*map(Text, row))
    return table
