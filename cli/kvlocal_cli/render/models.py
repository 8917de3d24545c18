"""What `kvlocal models` shows."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from kvlocal_cli.render.controls import plain
from kvlocal_cli.render.numbers import count, size

if TYPE_CHECKING:
    from kvlocal.models.listing import ModelFile

_TITLES = ("model", "size", "type", "architecture", "used", "path")


def models_text(found: Sequence[ModelFile], width: int | None) -> str:
    """One line per model; three where that is wider than `width` columns (None: as wide as need be)."""
    rows = [_TITLES, *map(_row, found)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    if width is not None and max(map(cell_len, lines)) > width:
        lines = [
            f"{name}\n  {n_bytes} · {kind} · {architecture} · used {used}\n  {path}"
            for name, n_bytes, kind, architecture, used, path in rows[1:]
        ]
    total = f"{count(len(found), 'model')}, {size(sum(model.size_bytes for model in found))}."
    default = next((plain(model.name) for model in found if model.is_default), None)
    return "\n".join(lines) + f"\n\n{total}" + (f" Without MODEL, {default} runs." if default else "")


def _row(model: ModelFile) -> tuple[str, ...]:
    home, path = str(Path.home()), str(model.path)
    used = time.strftime("%Y-%m-%d", time.localtime(model.last_used))
    shown = f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path
    kind = (model.quantization or "?", model.architecture or "?")
    return tuple(map(plain, (model.name, size(model.size_bytes), *kind, used, shown)))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The size to the right, everything else to the left; the path, which comes last, is not filled up."""
    *padded, path = cells
    parts = []
    for title, cell, width in zip(_TITLES, padded, widths, strict=False):
        room = " " * (width - cell_len(cell))
        parts.append(room + cell if title == "size" else cell + room)
    return "  ".join([*parts, path])
