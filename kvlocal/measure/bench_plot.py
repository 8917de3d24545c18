"""Plots of a benchmark over depth, with matplotlib, which is imported only here and only when used."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvlocal.errors import KVError, UsageError

SUFFIXES = (".svg", ".png")

_PANELS = (
    ("prefill_tps", "prefill at this depth, tokens/s", 1.0),
    ("decode_tps", "decode at this depth, tokens/s", 1.0),
    ("used_bytes", "K and V held, MiB", 2.0**-20),
)


def check_plot(path: Path) -> None:
    """Raises, before a long run, the errors that :func:`write_plot` would raise after it.

    Raises:
        UsageError: neither ``.svg`` nor ``.png``.
        KVError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"A plot is written as {' or '.join(SUFFIXES)}, not as '{path.name}'.")
    if importlib.util.find_spec("matplotlib") is None:
        raise KVError('A plot needs matplotlib; install it with pip install "kvlocal[plot]".')


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each of prefill, decode and memory that was measured, one line per variant.

    The band of a line runs from the slowest round to the fastest.

    Args:
        rows: fields of :class:`kvlocal.measure.bench.Result`.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(row[panel[0]] is not None for row in rows)]
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, (key, title, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in lines(rows, key).items():
            depths = [row["depth"] for row in points]
            (line,) = axes.plot(depths, [row[key] * scale for row in points], marker="o", markersize=3, label=label)
            if f"{key}_min" in points[0]:
                low, high = ([row[f"{key}_{end}"] * scale for row in points] for end in ("min", "max"))
                axes.fill_between(depths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="depth, tokens", title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.suptitle(str(rows[0]["model"]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    figure.savefig(path)


def lines(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of every variant that have ``key``, depths ascending, by what tells the variants apart."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["depth"])):
        if row[key] is None:
            continue
        parts = [row["policy"]]
        parts += [row["budget"]] if row["budget"] != "100%" else []
        parts += [row["prefill"]] if row["prefill"] != "exact" else []
        parts += [row["storage"]] if row["storage"] != "f16" else []
        parts += [f"reads {row['reads']}"] if row["reads"] else []
        out.setdefault(" ".join(parts), []).append(row)
    return out
