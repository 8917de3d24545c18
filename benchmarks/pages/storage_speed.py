"""Sections of docs/results.md from what depth_storage.py and ladder_cost.py measured."""

from __future__ import annotations

from typing import Any

from depth_storage import show

Row = dict[str, Any]


def depth(found: Row) -> str:
    rows: list[Row] = found["rows"]
    slower = [
        f"{row['storage']} at {row['depth']:,} ({row['vs']['ours f16'][0]:.2f})"
        for row in rows
        if row["cache"].startswith("ours") and row["vs"]["ours f16"][0] < 1
    ]
    stock = [row["vs"]["stock q4"][0] for row in rows if row["cache"] == "ours" and "stock q4" in row["vs"]]
    pages = [row["demote_page_per_layer_step"][0] for row in rows if "demote_page_per_layer_step" in row]
    return "\n\n".join(
        [
            f"```console\n$ {found['command']}\n```",
            "Tokens are decoded one by one after a long text, from our cache in every storage and from llama.cpp's own "
            "(stock) in turns; a ratio is that of two turns of one round, median (least to most). SmolLM2, Q4_1.",
            show(rows),
            f"Slower than our f16: {', '.join(slower) or 'none'}. Against llama.cpp's q4_0 ours are "
            f"{min(stock):.1f} to {max(stock):.1f} times as fast. Demoting a page of one head takes at most "
            f"{max(pages):.3f} of the decode step of one layer.",
        ]
    )


def ladder(found: Row) -> str:
    return (
        f"```console\n$ {found['command']}\n```\n\n"
        f"SmolLM2, Q4_1: {found['prompt']:,} tokens are read in {found['prompt_s']:.1f} s. To decide what becomes of "
        f"each token takes {found['decide_s']:.2f} s, {found['decide_s'] / found['prompt_s']:.1%} of that; with "
        f"dropping and demoting it is {found['evict_s']:.2f} s, {found['evict_s'] / found['prompt_s']:.1%}."
    )
