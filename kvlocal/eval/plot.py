"""Plots of evaluations, with matplotlib, which is imported only here and only when used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlocal.eval.records import MEASURES, Record, rows
from kvlocal.measure.bench_plot import check_plot

_TITLES = {"kl": "KL divergence, nats", "ppl_ratio": "perplexity ratio", "score": "score"}
_COLUMNS = 4  # heat maps side by side


def write_plot(records: Sequence[Record], path: Path) -> None:
    """Draw a heat map of score over length and depth for each variant (``needle``), else the main measure over bytes.

    Args:
        records: of one metric, at least one.

    Raises:
        UsageError: neither ``.svg`` nor ``.png``.
        KVError: matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if records[0].metric == "needle":
        _draw_needles(figure, records)
    else:
        _draw_curves(figure, records)
    figure.savefig(path)


def label(record: Record | Mapping[str, Any], *, budget: bool = True) -> str:
    """A short name that tells a record or row from others, such as ``ada-snapkv 25% chunked guide 64``."""
    of = record if isinstance(record, Mapping) else vars(record)
    parts = [of["policy"], of["budget"] if budget and of["budget"] != "100%" else ""]
    parts += ["chunked" if of["prefill"] == "chunked" else "", f"guide {of['guide']}" if of["guide"] else ""]
    parts.append(f"reads {of['reads']}" if of["reads"] else "")
    parts.append(f"recalls {of['recalls']}" if of["recalls"] else "")
    return " ".join(filter(None, [*parts, of["storage"] if of["storage"] != "f16" else ""]))


#
# needles
#


def grid(records: Sequence[Record]) -> tuple[list[float], list[float], np.ndarray]:
    """Lengths and depths, ascending, and the mean scores ``[n_depth, n_length]``, NaN where nothing was measured."""
    lengths = sorted({float(record.labels["length"]) for record in records})
    depths = sorted({float(record.labels["depth"]) for record in records})
    total, n = np.zeros((2, len(depths), len(lengths)))
    for record in records:
        cell = depths.index(float(record.labels["depth"])), lengths.index(float(record.labels["length"]))
        total[cell] += record.measures["score"]
        n[cell] += 1
    return lengths, depths, np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)


def _draw_needles(figure: Any, records: Sequence[Record]) -> None:
    """A map per variant; if the question was asked both ways, a row of maps for each."""
    modes = list(dict.fromkeys(record.question for record in records))
    maps: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        maps.setdefault(label(record), {}).setdefault(record.question, []).append(record)
    n_column = min(len(maps), _COLUMNS)
    n_row = -(-len(maps) // n_column) * len(modes)
    figure.set_size_inches(1.2 + 2.6 * n_column, 0.6 + 2.2 * n_row)
    panels = figure.subplots(n_row, n_column, squeeze=False)
    image = None
    for i, axes in enumerate(panels.flat):
        row, column = divmod(i, n_column)
        place, mode = row // len(modes) * n_column + column, modes[row % len(modes)]
        if place >= len(maps):
            axes.set_axis_off()
            continue
        name, found = list(maps.items())[place]
        if mode in found:
            lengths, depths, scores = grid(found[mode])
            image = axes.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,.0f}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_title(f"{name}\nquestion {mode}" if len(modes) > 1 else name, fontsize="medium")
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("depth")
    figure.colorbar(image, ax=panels, label="score", shrink=0.8)
    figure.suptitle(records[0].task)


#
# all others
#


def _draw_curves(figure: Any, records: Sequence[Record]) -> None:
    """A line per policy over its budgets, with intervals; a level for what evicts nothing."""
    measure = MEASURES.get(records[0].metric, "score")
    table = rows(records)
    n_task = len({row["task"] for row in table})
    table = [row for row in table if n_task == 1 or row["task"] == "all"]
    modes = list(dict.fromkeys(row["question"] for row in table))
    # each policy has its colour in every panel
    colours = {name: f"C{i}" for i, name in enumerate(curves(table))}
    figure.set_size_inches(5.2 * len(modes), 4.4)
    for axes, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes, strict=True):
        own = [row for row in table if row["question"] == mode]
        for name, points in curves(own).items():
            _draw_curve(axes, name, points, measure, colours[name])
        if measure == "kl" and axes.lines:
            axes.set_yscale("log")
        for row, style in zip((row for row in own if _whole(row)), itertools.cycle(("--", ":"))):
            _draw_level(axes, row, measure, style)
        if measure == "score":
            axes.set_ylim(bottom=0)
        axes.set(xlabel="K and V held, MiB", title=f"question {mode}" if mode else "")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(_TITLES[measure])
    figure.suptitle(" · ".join(dict.fromkeys((records[0].metric, table[0]["task"]))))
    shown = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=min(len(shown), 3), frameon=False
    )


def curves(table: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of every policy that evicts, by bytes ascending."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(table, key=lambda row: float(row["used_bytes"])):
        if not _whole(row):
            out.setdefault(label(row, budget=False), []).append(row)
    return out


def _draw_curve(axes: Any, name: str, points: Sequence[Mapping[str, Any]], measure: str, colour: str) -> None:
    x = np.array([row["used_bytes"] for row in points]) / 2**20
    y, low, high = (np.array([row[key] for row in points]) for key in (measure, "ci_low", "ci_high"))
    axes.plot(x, y, marker="o", markersize=3, color=colour, label=name)
    # bars, not a band: a single point has them too
    axes.errorbar(x, y, [(y - low).clip(0), (high - y).clip(0)], fmt="none", color=colour, capsize=2)


def _draw_level(axes: Any, row: Mapping[str, Any], measure: str, style: str) -> None:
    """Levels of the variants that evict nothing. A KL far below the policies' is given in the legend, not drawn."""
    value, low = row[measure], axes.get_ylim()[0]
    if measure != "kl" or value >= low:
        axes.axhline(value, color="grey", linestyle=style)
    name = f"{label(row)}: {value:.2g}" if measure == "kl" else label(row)
    axes.plot([], [], color="grey", linestyle=style, label=name)


def _whole(row: Mapping[str, Any]) -> bool:
    return row["policy"] in ("full", "paged")
