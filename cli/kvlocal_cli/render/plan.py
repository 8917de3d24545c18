"""What `kvlocal plan` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvlocal_cli.render.numbers import number, placement, size


def plan_view(plan: Mapping[str, Any], *, helps: bool) -> list[RenderableType]:
    """A plan: what is planned, what it takes, whether it fits, and, if something `helps`, the line before that."""
    parts: list[RenderableType] = [Text(_run(plan)), _needs(plan), Text(_verdict(plan))]
    parts.append(Text(f"Largest context, {plan['prefill']} prefill: {_largest(plan['max_context'])}."))
    if not plan["fits"]:
        parts.append(Text("This would:" if helps else "Nothing that the cache could do helps; use a smaller model."))
    return parts


def _run(plan: Mapping[str, Any]) -> str:
    kept = plan["policy"] if plan["policy"] == "full" else f"{plan['policy']} {plan['budget']}"
    each = f"{number(plan['parallel'])} sequences, each " if plan["parallel"] > 1 else ""
    threads = f"{plan['threads']} thread{'' if plan['threads'] == 1 else 's'}"
    pages = "".join(f"\npages of {placement(place)}" for place in plan["pages"])
    return (
        f"{plan['model']} · {kept} · kv {plan['storage']} · {plan['prefill']} prefill\n"
        f"{each}a context of {number(plan['n_ctx'])}: a prompt of {number(plan['n_prompt'])} tokens, "
        f"{number(plan['n_generate'])} generated\n"
        f"{threads}: {plan['threads_reason']}{pages}"
    )


def _needs(plan: Mapping[str, Any]) -> Table:
    kv = plan["kv"]
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    used = f"{size(kv['used_bytes'])} in use at the end; full f16: {size(kv['full_bytes'])}"
    rows = [
        ("weights", plan["weights_bytes"], ""),
        ("KV peak", kv["peak_bytes"], used),
        ("window queries", kv["query_bytes"], "remembered for the policy, f32"),
        ("page tables", kv["table_bytes"], "positions, attention mass and units included"),
        ("compute buffers", plan["compute_bytes"], ""),
        ("recalled, most", kv["recall_bytes"], f"from an archive of {size(kv['archive_bytes'])} on disk"),
    ]
    for label, n_bytes, note in rows:
        if n_bytes:
            table.add_row(label, size(n_bytes), Text(note, "dim"))
    table.add_section()
    for label, main, device in (("total", "total", "device"), ("free", "free", "device_free")):
        there = f"and {size(plan[f'{device}_bytes'])} on accelerators" if plan["device_bytes"] else ""
        table.add_row(label, size(plan[f"{main}_bytes"]), Text(there))
    return table


def _verdict(plan: Mapping[str, Any]) -> str:
    if plan["fits"]:
        return "It fits."
    lacking = plan["total_bytes"] - plan["free_bytes"]
    lacks = [f"{size(lacking)} of main memory"] if lacking > 0 else []
    lacking = plan["device_bytes"] - plan["device_free_bytes"]
    lacks += [f"{size(lacking)} on accelerators"] if plan["device_bytes"] and lacking > 0 else []
    return f"It does not fit: {' and '.join(lacks)} too little."


def _largest(contexts: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name} {_context(n)}" for name, n in contexts.items())


def _context(n: int | None) -> str:
    return "n/a" if n is None else number(n) if n else "none"
