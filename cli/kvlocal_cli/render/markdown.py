"""Tables as Markdown whose source is aligned too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len

from kvlocal_cli.render.controls import plain


def markdown_table(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """The table, ended by a newline.

    `columns`: titles, and whether they head names (to the left) or numbers (to the right).
    """
    titles = [title for title, _ in columns]
    cells = [[_cell(text) for text in row] for row in (titles, *rows)]
    # a rule is at least three characters
    widths = [max(3, *map(cell_len, texts)) for texts in zip(*cells, strict=True)]
    left = [is_name for _, is_name in columns]
    rule = ["-" * width if to else "-" * (width - 1) + ":" for width, to in zip(widths, left, strict=True)]
    lines = [[_pad(*each) for each in zip(row, widths, left, strict=True)] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    """One line, and no bar that would end the cell."""
    return " ".join(plain(text).split()).replace("|", "\\|")


def _pad(text: str, width: int, left: bool) -> str:
    room = " " * (width - cell_len(text))
    return text + room if left else room + text
