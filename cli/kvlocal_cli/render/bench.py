"""What `kvlocal bench` prints: a table for people, as Markdown or drawn; JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvlocal_cli.render.controls import plain, plain_json
from kvlocal_cli.render.markdown import markdown_table
from kvlocal_cli.render.numbers import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvlocal.measure.bench_config import Step

Row = Mapping[str, Any]
Machine = Mapping[str, Any]

NOTHING = "–"


def as_json(machine: Machine, rows: Sequence[Row]) -> str:
    """One object: the machine and all results."""
    text = json.dumps({"machine": machine, "results": rows}, indent=1, ensure_ascii=False, allow_nan=False)
    return plain_json(text) + "\n"


def as_csv(_machine: Machine, rows: Sequence[Row]) -> str:
    """The results, one line each; what was not measured is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return plain(file.getvalue())


def as_md(machine: Machine, rows: Sequence[Row]) -> str:
    """A heading and a table; ratios if `full` was measured, and no column that says nothing."""
    return f"{plain(_heading(machine, rows[0]))}\n\n{markdown_table(*_table(rows))}"


def as_rich(machine: Machine, rows: Sequence[Row], width: int) -> list[RenderableType]:
    """The same for a terminal that is `width` columns wide."""
    from rich.text import Text

    from kvlocal_cli.render.table import results_table

    return [Text(_heading(machine, rows[0])), "", results_table(*_table(rows), width)]


def step_text(step: Step) -> str:
    """`depth 4,096 · ada-snapkv 25% · prefill 2,048/4,096`."""
    return f"depth {step.depth:,} · {step.label} · {step.action} {step.done:,}/{step.total:,}"


def _table(rows: Sequence[Row]) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    """Columns (see :func:`markdown_table`) and cells."""
    full = [row for row in rows if row["policy"] == "full"]
    # of several storages the first one that was asked for, unless f16 is among them
    base = min((row["storage"] for row in full), key=lambda storage: storage != "f16", default="f16")
    baseline = {row["depth"]: row for row in full if row["storage"] == base}
    versus = "x full" if base == "f16" else f"x full {base}"

    def ratio(key: str) -> Callable[[Row], str]:
        return lambda row: _ratio(row[key], baseline.get(row["depth"], {}).get(key))

    def both(key: str) -> bool:
        return bool(baseline) and _any(rows, key)

    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("depth", True, lambda row: f"{row['depth']:,}"),
        ("policy", True, lambda row: str(row["policy"])),
        ("budget", True, lambda row: str(row["budget"])),
        ("mode", any(row["prefill"] != "exact" for row in rows), lambda row: str(row["prefill"])),
        ("kv", any(row["storage"] != "f16" for row in rows), lambda row: str(row["storage"])),
        ("reads", any(row["reads"] for row in rows), lambda row: row["reads"] or "all"),
        ("prefill t/s", _any(rows, "prefill_tps"), lambda row: _rate(row["prefill_tps"])),
        (versus, both("prefill_tps"), ratio("prefill_tps")),
        ("decode t/s", _any(rows, "decode_tps"), lambda row: _range(row, "decode_tps")),
        (versus, both("decode_tps"), ratio("decode_tps")),
        ("used", True, lambda row: size(row["used_bytes"])),
        ("peak", True, lambda row: size(row["peak_bytes"])),
        ("evict s", _any(rows, "evict_s"), lambda row: _seconds(row["evict_s"])),
        ("prompt s", not _any(rows, "ttft_s"), lambda row: _seconds(row["prompt_s"])),
        ("ttft s", _any(rows, "ttft_s"), lambda row: _seconds(row["ttft_s"])),
    ]
    shown = [(title, cell) for title, wanted, cell in columns if wanted]
    return [(title, title in _NAMES) for title, _ in shown], [[cell(row) for _, cell in shown] for row in rows]


_NAMES = ("policy", "budget", "mode", "kv", "reads")


def _heading(machine: Machine, row: Row) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''} of {machine['cores']} cores"
    parts = [str(row["model"]), str(machine["cpu"]), threads]
    parts.append(f"memory read at {machine['read_bytes_per_s'] / 1e9:.1f} GB/s")
    if row["n_prompt"]:
        parts.append(f"prefill of {row['n_prompt']:,} tokens")
    if row["n_gen"]:
        parts.append(f"decode of {row['n_gen']:,}: median (least–most)")
    return " · ".join(parts)


def _any(rows: Sequence[Row], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def _range(row: Row, key: str) -> str:
    if row[key] is None:
        return NOTHING
    return f"{_rate(row[key])} ({_rate(row[f'{key}_min'])}–{_rate(row[f'{key}_max'])})"


def _ratio(value: float | None, base: float | None) -> str:
    return NOTHING if value is None or not base else f"{value / base:.2f}"


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
