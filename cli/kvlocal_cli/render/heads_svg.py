"""The same as a picture: an SVG file that needs nothing else."""

from __future__ import annotations

from xml.sax.saxutils import escape

import numpy as np

from kvlocal_cli.render.controls import plain
from kvlocal_cli.render.heads import RUNGS, Rungs
from kvlocal_cli.render.numbers import number

# from what is stored most precisely to what is not stored: dark to light, told apart by most of the colour-blind
_COLOURS = dict(
    zip(
        RUNGS,
        ("#0b3c5d", "#1f77a4", "#4fb0c6", "#8fd3b6", "#f2c14e", "#d9822b", "#a4508b", "#e4e4e4"),
        strict=True,
    )
)
_LABEL, _TOP, _ROW, _GAP = 44, 78, 14, 6
_FONT = "font-family='sans-serif' font-size='11' fill='#222222'"


def rungs_svg(rungs: Rungs, title: str) -> str:
    """A row per layer, a bar per KV head with a segment per format; the exact counts are in the tool tips."""
    n_head = max((len(layer) for layer in rungs.layers), default=1)
    bar = max(24, min(160, 960 // n_head - _GAP))
    width = max(_LABEL + n_head * (bar + _GAP) + 10, 560)
    height = _TOP + len(rungs.layers) * _ROW + 14
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        _text(10, 20, plain(title), "font-weight='bold'"),
        _text(10, 38, f"{rungs.n_seen:,} tokens read; rows: layers, columns: KV heads, segments: how they are stored"),
        *_legend(rungs),
    ]
    for index, layer in enumerate(rungs.layers):
        y = _TOP + index * _ROW
        parts.append(_text(_LABEL - 8, y + _ROW - 4, str(index), "text-anchor='end'"))
        for head, counts in enumerate(layer):
            parts += _bar(counts, _LABEL + head * (bar + _GAP), y, bar, f"layer {index}, head {head}")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(rungs: Rungs) -> list[str]:
    parts, x = [], 10
    for name, n in zip(RUNGS, rungs.total(), strict=True):
        if not n:
            continue
        said = f"{name} {number(n / rungs.n_heads)}"
        parts += [f"<rect x='{x}' y='50' width='12' height='12' fill='{_COLOURS[name]}'/>", _text(x + 16, 60, said)]
        x += 28 + 7 * len(said)
    return [*parts, _text(x, 60, "(tokens per head, mean)")]


def _bar(counts: np.ndarray, x: int, y: int, width: int, where: str) -> list[str]:
    total = max(int(counts.sum()), 1)
    said = ", ".join(f"{name} {n:,}" for name, n in zip(RUNGS, counts, strict=True) if n)
    parts = [f"<g><title>{escape(f'{where}: {said}')}</title>"]
    done = 0
    for name, n in zip(RUNGS, counts, strict=True):
        if n:
            start, length = x + width * done / total, width * int(n) / total
            parts.append(
                f"<rect x='{start:.2f}' y='{y}' width='{length:.2f}' height='{_ROW - 3}' fill='{_COLOURS[name]}'/>"
            )
            done += int(n)
    return [*parts, "</g>"]


def _text(x: int, y: int, text: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' {_FONT} {more}>{escape(text)}</text>"
