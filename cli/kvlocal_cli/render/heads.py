"""How every layer and KV head holds its tokens: counts per format, drawn with letters and colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvlocal.native.formats import FORMATS
from kvlocal_cli.render.numbers import number

GONE = "gone"
RUNGS = (*FORMATS, GONE)
LETTERS = dict(zip(RUNGS, "F8432KT·", strict=True))
_STYLES = dict(
    zip(RUNGS, ("green", "cyan", "blue", "magenta", "red", "yellow", "bright_red", "bright_black"), strict=True)
)
_WIDTH = 80
_NARROW = 8
"""Columns of a head's bar below which one bar stands for all heads of a layer."""


@dataclass(frozen=True)
class Rungs:
    """What a sequence holds.

    Attributes:
        n_seen: tokens read.
        layers: per layer how many tokens of every head stand in every format and are gone, int ``[n_head, n_rungs]``.
    """

    n_seen: int
    layers: Sequence[np.ndarray]

    @property
    def used(self) -> list[str]:
        """The rungs that anything stands on, in their order."""
        return [name for name, n in zip(RUNGS, self.total(), strict=True) if n]

    def total(self) -> np.ndarray:
        """Slots per rung, over all layers and heads."""
        return np.sum([layer.sum(0) for layer in self.layers], axis=0) if self.layers else np.zeros(len(RUNGS), int)

    @property
    def n_heads(self) -> int:
        """Heads of all layers."""
        return sum(len(layer) for layer in self.layers)


def count_rungs(n_seen: int, slot_formats: Sequence[Sequence[np.ndarray]]) -> Rungs:
    """Rungs from the formats of all slots: per layer and head an array of indices into FORMATS."""
    layers = []
    for heads in slot_formats:
        held = np.array([np.bincount(head, minlength=len(FORMATS)) for head in heads]).reshape(-1, len(FORMATS))
        gone = np.maximum(n_seen - held.sum(1, keepdims=True), 0)
        layers.append(np.hstack([held, gone]))
    return Rungs(n_seen, layers)


def rungs_map(rungs: Rungs) -> RenderableType:
    """One row per layer, at most 80 columns wide: a bar per head, or of many heads one bar for their mean."""
    if not rungs.n_heads or not rungs.total()[:-1].any():
        return Text("The cache is empty.")
    label = len(str(len(rungs.layers) - 1))
    digits = len(f"{rungs.n_seen:,}")
    n_head = max(map(len, rungs.layers))
    # a bar, a space, its count and two spaces, as often as there are heads
    bar = min((_WIDTH - label - 1) // n_head - digits - 3, 24)
    rows = Text()
    for index, layer in enumerate(rungs.layers):
        if index:
            rows.append("\n")
        rows.append(f"{index:>{label}} ", "dim")
        if bar >= _NARROW:
            for head in layer:
                rows.append_text(_bar(head, bar))
                rows.append(f" {_held(head):>{digits},}  ")
        else:
            held = [_held(head) for head in layer]
            rows.append_text(_bar(layer.sum(0), _WIDTH - label - 4 - 2 * digits))
            rows.append(f" {min(held):>{digits},}-{max(held):,}", "dim")
        rows.rstrip()
    columns = "columns: KV heads, and tokens held" if bar >= _NARROW else "all KV heads in one bar, least-most held"
    title = Text(f"{rungs.n_seen:,} tokens read. Rows: layers; {columns}.")
    hint = Text("/kv LAYER lists the heads of a layer, /kv FILE.svg writes the picture.", "dim")
    return Group(title, rows, legend(rungs), hint)


def legend(rungs: Rungs) -> Text:
    """What the letters mean, and how many tokens of a head stand there on average."""
    text, column = Text("Mean of a head:"), 15
    for name, n in zip(RUNGS, rungs.total(), strict=True):
        if not n:
            continue
        said = f" {name} {number(n / rungs.n_heads)}"
        column += 3 + 1 + len(said)
        if column > _WIDTH:
            text.append("\n")
            column = 3 + 1 + len(said)
        text.append("   ").append(LETTERS[name], _STYLES[name]).append(said)
    return text


def layer_table(rungs: Rungs, index: int) -> Table:
    """The heads of one layer in numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"layer {index}, head", justify="right", overflow="fold")
    names = rungs.used
    for name in (*[name for name in names if name != GONE], "held", GONE):
        table.add_column(name, justify="right", style=_STYLES.get(name), overflow="fold")
    for head, counts in enumerate(rungs.layers[index]):
        cells = [f"{counts[RUNGS.index(name)]:,}" for name in names if name != GONE]
        table.add_row(f"{head}", *cells, f"{_held(counts):,}", f"{counts[-1]:,}")
    return table


def shares(counts: np.ndarray, width: int) -> list[int]:
    """`width` cells shared out by counts; whatever is there at all gets one, as far as they go."""
    total = int(counts.sum())
    if not total:
        return [0] * len(counts)
    exact = counts * (width / total)
    cells = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(int)
    while cells.sum() < width:
        cells[int(np.argmax(exact - cells))] += 1
    while cells.sum() > width:
        cells[int(np.argmax(np.where(cells > 0, cells - exact, -np.inf)))] -= 1
    return [int(n) for n in cells]


def _held(counts: np.ndarray) -> int:
    return int(counts[:-1].sum())


def _bar(counts: np.ndarray, width: int) -> Text:
    text = Text()
    for name, n in zip(RUNGS, shares(counts, width), strict=True):
        text.append(LETTERS[name] * n, _STYLES[name])
    return text
