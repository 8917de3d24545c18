"""What was measured of an answer: while it is written, in one line after it, in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kvlocal_cli.render.numbers import number, percent, rate, rounded_percent, seconds, size

ReportDict = Mapping[str, Any]


def live_figures(kv: Mapping[str, float], peak_bytes: float, tokens_per_second: float | None, width: int) -> str:
    """The line below an answer that is being written, in at most `width` columns; `kv` as `Engine.kv` gives it."""
    used, full, peak = size(kv["used_bytes"]), size(kv["full_bytes"]), size(peak_bytes)
    held, speed = number(kv["held_mean"]), rate(tokens_per_second)
    disk = f" · {size(kv['archive_bytes'])} on disk" if kv["archive_bytes"] else ""
    texts = (
        f"KV {used} in use / {full} full / {peak} peak · {held} tokens held per head{disk} · {speed}",
        f"KV {used} / {full} / {peak} · {held} held{disk} · {speed}",
        f"KV {used} · {held} held · {speed}",
    )
    return next((text for text in texts if len(text) <= width), texts[-1][:width])


def figures(report: ReportDict) -> str:
    """The line after an answer. All measured, save for what a full cache *would* take: that one never existed."""
    kv, tokens, timing = report["kv"], report["tokens"], report["timing"]
    reads, archive = report["reads"], report["archive"]
    held = f"{number(tokens['held_mean'])} tokens held per head"
    if tokens["held_min"] != tokens["held_max"]:
        held += f" ({number(tokens['held_min'])} to {number(tokens['held_max'])})"
    parts = [
        f"KV {size(kv['used_bytes'])} in use / {size(kv['full_bytes'])} a full cache would take"
        f" / {size(kv['peak_bytes'])} peak",
        *([f"{size(kv['fixed_bytes'])} of it windows and states"] if kv["fixed_bytes"] else []),
        held,
        *([f"{number(reads['tokens'])} read at a time"] if reads else []),
        *([f"{size(archive['bytes'])} on disk, {number(archive['recalled'])} tokens recalled"] if archive else []),
        *([archive["error"]] if archive and archive["error"] else []),
        f"prefill {rate(timing['prefill_tps'])}, decode {rate(timing['decode_tps'])}",
    ]
    ending = {"length": "cut at the token limit", "interrupted": "interrupted"}.get(str(report["finish_reason"]))
    return " · ".join([*parts, ending] if ending else parts)


def budget_text(budget: Mapping[str, Any]) -> str:
    """A budget in all its units: `1,034 tokens per head = 25% = 23.3 MiB`."""
    return f"{number(budget['tokens'])} tokens per head = {percent(budget['fraction'])} = {size(budget['bytes'])}"


def _reads(reads: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not reads:
        return []
    return [
        ("retriever", reads["retriever"]),
        ("tokens read per token, mean", number(reads["tokens"])),
        *([("of those chosen, as before", percent(reads["kept"]))] if reads["kept"] is not None else []),
        ("what stands for units", size(reads["index_bytes"])),
        ("choosing", seconds(reads["choose_s"])),
    ]


def _archive(archive: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not archive:
        return []
    lost = f", {number(archive['units_lost'])} of them lost" if archive["units_lost"] else ""
    return [
        ("archive, on disk", f"{size(archive['bytes'])}, {number(archive['units'])} units{lost}"),
        (f"tokens recalled per {archive['recall']}, mean", number(archive["recalled"])),
        *([("of those asked for, missed", number(archive["missed"]))] if archive["missed"] else []),
        ("read from disk", size(archive["read_bytes"])),
        *([("what went wrong", archive["error"])] if archive["error"] else []),
    ]


def stats_table(report: ReportDict) -> Table:
    """Every figure of a report."""
    kv, rss, tokens, timing = report["kv"], report["rss"], report["tokens"], report["timing"]
    args = ", ".join(f"{name}={value}" for name, value in report["policy_args"].items())
    before, after = rss["before_evict_bytes"], rss["after_evict_bytes"]
    sections = [
        [
            ("model", str(report["model"])),
            ("policy", f"{report['policy']} ({args})" if args else str(report["policy"])),
            ("budget", budget_text(report["budget"])),
        ],
        [
            ("tokens of the prompt", number(tokens["prompt"])),
            ("tokens generated", number(tokens["generated"])),
            ("tokens held per head, mean", number(tokens["held_mean"])),
            ("tokens held, least / most", f"{number(tokens['held_min'])} / {number(tokens['held_max'])}"),
            *_reads(report["reads"]),
        ],
        *([rows] if (rows := _archive(report["archive"])) else []),
        [
            ("KV in use", size(kv["used_bytes"])),
            ("KV allocated", size(kv["allocated_bytes"])),
            ("KV peak", size(kv["peak_bytes"])),
            *([("of it windows and states", size(kv["fixed_bytes"]))] if kv["fixed_bytes"] else []),
            ("a full f16 cache would take", size(kv["full_bytes"])),
        ],
        [
            ("RSS before / after eviction", "no eviction" if before is None else f"{size(before)} / {size(after)}"),
            ("RSS peak", size(rss["peak_bytes"])),
        ],
        [
            ("load", seconds(timing["load_s"])),
            ("prefill", f"{seconds(timing['prefill_s'])}, {rate(timing['prefill_tps'])}"),
            ("time to first token", seconds(timing["ttft_s"])),
            ("eviction", seconds(timing["evict_s"])),
            ("decode", f"{seconds(timing['decode_s'])}, {rate(timing['decode_tps'])}"),
            ("finish reason", str(report["finish_reason"])),
        ],
    ]
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for rows in sections:
        for label, value in rows:
            table.add_row(label, Text(value), end_section=label == rows[-1][0])
    return table


def comparison_table(reports: Sequence[ReportDict]) -> Table:
    """One column per report: two of them fit 60 columns, four fit 80."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("policy", style="dim")
    for report in reports:
        table.add_column(Text(str(report["policy"])), justify="right", overflow="fold")

    def evicted(key: str) -> Callable[[ReportDict], str]:
        return lambda report: "no eviction" if report["rss"][key] is None else size(report["rss"][key])

    def budget(report: ReportDict) -> str:
        return f"{number(report['budget']['tokens'])} ({rounded_percent(report['budget']['fraction'])})"

    rows: list[tuple[str, Callable[[ReportDict], str]]] = [
        ("budget, tokens per head", budget),
        ("tokens held, mean", lambda report: number(report["tokens"]["held_mean"])),
        ("KV in use", lambda report: size(report["kv"]["used_bytes"])),
        ("KV peak", lambda report: size(report["kv"]["peak_bytes"])),
        ("a full cache would take", lambda report: size(report["kv"]["full_bytes"])),
        ("RSS before eviction", evicted("before_evict_bytes")),
        ("RSS after eviction", evicted("after_evict_bytes")),
        ("prefill", lambda report: rate(report["timing"]["prefill_tps"])),
        ("decode", lambda report: rate(report["timing"]["decode_tps"])),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(report) for report in reports))
    return table
