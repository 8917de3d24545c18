"""Tables of results that fit the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_GAP = 3  # columns that rich puts between two cells


def results_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A table whose every line fits `width` columns; one that is too wide becomes a block of lines per row.

    `columns`: titles, and whether they head names (to the left) or numbers (to the right).
    """
    widths = [max(map(cell_len, cells)) for cells in zip([title for title, _ in columns], *rows, strict=True)]
    if sum(widths) + _GAP * len(widths) > width:
        return _blocks(columns, rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, is_name in columns:
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True)
    for row in rows:
        # as text: brackets are no markup
        table.add_row(*map(Text, row))
    return table


def _blocks(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> Group:
    """The names of a row as a heading, each of its numbers on a line of its own."""
    label = max(cell_len(title) for title, is_name in columns if not is_name)
    parts: list[RenderableType] = []
    for row in rows:
        cells = list(zip(columns, row, strict=True))
        names = " · ".join(cell if n == 0 else f"{title} {cell}" for n, (title, cell) in enumerate(_names(cells)))
        parts.append(Text(names, "bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(style="dim", min_width=label + 2)
        table.add_column(overflow="fold")
        for (title, is_name), cell in cells:
            if not is_name:
                table.add_row(Text(f"  {title}"), Text(cell))
        parts.append(table)
    return Group(*parts)


def _names(cells: Sequence[tuple[tuple[str, bool], str]]) -> list[tuple[str, str]]:
    return [(title, cell) for (title, is_name), cell in cells if is_name]
