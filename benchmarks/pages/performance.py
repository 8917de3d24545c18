"""docs/performance.md from the figures that performance.py measured; every sentence with a number is computed here."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import table

Rows = list[dict[str, Any]]

MODELS = {
    "smollm2-135m": "SmolLM2-135M-Instruct, Q4_1 (30 layers, 9 query and 3 KV heads of 64)",
    "llama-1b": "random weights in the shape of Llama 3.2 1B, Q4_0 (16 layers, 32 query and 8 KV heads of 64)",
}

HEAD = """# Performance

Written by `python benchmarks/performance.py` from its own measurements; nothing here is typed by hand. "Stock" is
llama.cpp of the same build with its own f16 cache and flash attention (`--policy full`), "pages" our cache and kernels
with nothing evicted (`--policy paged`), "budget" is `--policy ada-snapkv --budget 1024 --prefill chunked`. All three
take turns in one process on {threads} threads, five rounds; medians. Machine: {cpu}, {cores} cores; it reads memory at
{gbps:.1f} GB/s. {measured_at}
"""


def at(rows: Rows, policy: str, depth: int) -> dict[str, Any]:
    return next(r for r in rows if r["policy"] == policy and r["depth"] == depth)


def ratio(rows: Rows, key: str, policy: str, depth: int, stock_depth: int | None = None) -> float:
    stock = at(rows, "full", depth if stock_depth is None else stock_depth)
    return float(at(rows, policy, depth)[key] / stock[key])


def roofline(rows: Rows, policy: str, depth: int, bandwidth: float) -> tuple[float, float]:
    """GB/s at which attention reads K and V, and as a share of the bandwidth.

    Its time is what a step takes more than the same context's step at depth 0.
    """
    row, empty = at(rows, policy, depth), at(rows, policy, 0)
    speed = row["attention_bytes_per_token"] / (1 / row["decode_tps"] - 1 / empty["decode_tps"])
    return speed / 1e9, speed / bandwidth


def speeds(rows: Rows, bandwidth: float) -> str:
    out = []
    for depth in sorted({r["depth"] for r in rows}):
        stock, pages, small = (at(rows, name, depth) for name in ("full", "paged", "ada-snapkv"))
        read = ""
        if depth:
            gbps, share = roofline(rows, "paged", depth, bandwidth)
            read = f"{gbps:.1f} GB/s = {100 * share:.0f} %"
        out.append(
            [
                depth,
                *(f"{r['decode_tps']:.1f}" for r in (stock, pages)),
                f"**{pages['decode_tps'] / stock['decode_tps']:.2f}**",
                f"{small['decode_tps']:.1f}",
                f"{pages['attention_bytes_per_token'] / 1e6:.1f}",
                read,
                *(f"{r['prefill_tps']:.0f}" for r in (stock, pages)),
                f"**{pages['prefill_tps'] / stock['prefill_tps']:.2f}**",
                f"{small['prefill_tps']:.0f}",
            ]
        )
    header = [
        "depth",
        "decode: stock",
        "pages",
        "ratio",
        "budget",
        "MB read",
        "of memory's",
        "prefill 512: stock",
        "pages",
        "ratio",
        "budget",
    ]
    return table(header, out)


def prompts(rows: Rows) -> str:
    out = []
    for depth in sorted({r["depth"] for r in rows} - {0}):
        stock, pages, small = (at(rows, name, depth) for name in ("full", "paged", "ada-snapkv"))
        seconds = [r["prompt_s"] + (r["evict_s"] or 0) for r in (stock, pages, small)]
        out.append(
            [
                depth,
                *(f"{s:.1f}" for s in seconds),
                f"{seconds[0] / seconds[1]:.2f}",
                f"{seconds[0] / seconds[2]:.2f}",
                f"{100 * small['evict_s'] / seconds[2]:.1f} %",
                *(f"{r['peak_bytes'] / 2**20:.1f}" for r in (stock, pages, small)),
            ]
        )
    header = [
        "prompt",
        "stock s",
        "pages s",
        "budget s",
        "pages ratio",
        "budget ratio",
        "evictions",
        "peak MiB: stock",
        "pages",
        "budget",
    ]
    return table(header, out)


def fit(rows: Rows) -> tuple[float, float, float, float]:
    """ms = a + b kept + c evicted by least squares: a, b and c per 1000 slots, and R^2."""
    x = np.array([[1, r["kept"] / 1000, r["evicted"] / 1000] for r in rows])
    y = np.array([r["ms"] for r in rows])
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    residual = y - x @ solution
    a, b, c = (float(s) for s in solution)
    return a, b, c, float(1 - residual.var() / y.var())


def targets(results: dict[str, Any]) -> str:
    """Every target of the kernels, what was measured, and whether it was met."""
    smol, big = results.get("smollm2-135m"), results.get("llama-1b")
    out: list[tuple[str, float, float, bool]] = []  # what, measured, asked, at least (else at most)

    def sweep(rows: Rows, name: str, decode: dict[int, float]) -> None:
        out.extend(
            (f"{name}: decode at {d}, nothing evicted", ratio(rows, "decode_tps", "paged", d), x, True)
            for d, x in decode.items()
        )
        out.append(
            (
                f"{name}: decode after 32768 at budget 1024, to stock at 1024",
                ratio(rows, "decode_tps", "ada-snapkv", 32768, 1024),
                1.0,
                True,
            )
        )
        out.append((f"{name}: the same, to stock at 32768", ratio(rows, "decode_tps", "ada-snapkv", 32768), 8.0, True))
        out.extend(
            (f"{name}: prefill of 512 at {d}", ratio(rows, "prefill_tps", "paged", d), x, True)
            for d, x in ((0, 1.0), (2048, 1.3), (7168, 1.7))
        )
        out.append(
            (
                f"{name}: whole prompt of 8192, chunked at budget 1024",
                ratio(rows, "prompt_tps", "ada-snapkv", 8192),
                1.8,
                True,
            )
        )
        share = roofline(rows, "paged", 32768, results["machine"]["read_bytes_per_s"])[1]
        out.append((f"{name}: attention's share of memory bandwidth at 32768", share, 0.7, True))

    if smol:
        sweep(smol, "SmolLM2", {4096: 1.6, 8192: 2.0, 32768: 3.0})
    if big:
        sweep(big, "1B", {8192: 1.7, 32768: 2.5})
    if "error" in results:
        worst = max(r["pages"] for r in results["error"] if r["slots"] == 32768)
        out.append(("output error against f64 at 32768 slots", worst, 1e-4, False))
        out.append(
            (
                "largest error as a multiple of stock's",
                max(r["pages"] / r["stock"] for r in results["error"]),
                1.0,
                False,
            )
        )
    if "eviction" in results:
        share = max(r["evict_s"] / r["prompt_s"] for r in results["eviction"])
        out.append(("eviction after 8192 tokens, share of the prefill", share, 0.03, False))
    if "mass" in results:
        share = max((r["mass_ms"] - r["plain_ms"]) / (r["plain_ms"] - r["base_ms"]) for r in results["mass"])
        out.append(("attention mass, share of the attention time", share, 0.35, False))
    rows = [
        [
            what,
            f"{got:.2g}" if got < 0.01 else f"{got:.2f}",
            f"{'≥' if least else '≤'} {want:g}",
            "yes" if (got >= want) == least or got == want else "**no**",
        ]
        for what, got, want, least in out
    ]
    return table(["target", "measured", "asked", "met"], rows)


def page(results: dict[str, Any], measured_at: str) -> str:
    """The whole page, of the parts that were measured; ``measured_at`` says at which commit that was."""
    machine = results["machine"]
    text = [
        HEAD.format(**machine, gbps=machine["read_bytes_per_s"] / 1e9, measured_at=measured_at),
        "## Targets\n",
        targets(results),
    ]
    for name, what in MODELS.items():
        if name not in results:
            continue
        text += [
            f"\n## {what}\n",
            'Tokens/s by depth. "MB read" is K and V read per decoded token, the column after it how fast attention '
            "reads them (time beyond a step at depth 0) and the share of the memory bandwidth that is.\n",
            speeds(results[name], machine["read_bytes_per_s"]),
            "\nWhole prompts, evictions included (one run each, the three taking turns step by step):\n",
            prompts(results[name]),
        ]
    if "error" in results:
        text.append(
            "\n## Accuracy\n\nRelative error of one attention step against f64, f16 keys and values (random; flat: "
            "nearly equal weights):\n"
        )
        rows = [
            [r["head"], r["slots"], r["attention"], f"{r['pages']:.1e}", f"{r['stock']:.1e}"] for r in results["error"]
        ]
        text.append(table(["head size", "slots", "attention", "pages", "stock"], rows))
    if "eviction" in results:
        text.append(
            f"\n## Eviction\n\nAt the end of a prompt of {results['eviction'][0]['prompt']} tokens on the first model, "
            "down to 1024 per head:\n"
        )
        rows = [
            [
                r["policy"],
                f"{r['prompt_s']:.1f}",
                f"{r['evict_s']:.3f}",
                f"{r['score_s']:.3f}",
                f"{r['keep_s']:.3f}",
                f"{100 * r['evict_s'] / r['prompt_s']:.2f} %",
            ]
            for r in results["eviction"]
        ]
        text.append(table(["policy", "prefill s", "eviction s", "of it scores", "moves", "share"], rows))
    if "mass" in results:
        text.append("\n## Attention mass\n\nMilliseconds per decoded token on the first model:\n")
        rows = [
            [
                r["depth"],
                f"{r['plain_ms']:.2f}",
                f"{r['mass_ms']:.2f}",
                f"{r['base_ms']:.2f}",
                f"{100 * (r['mass_ms'] - r['plain_ms']) / (r['plain_ms'] - r['base_ms']):.0f} %",
            ]
            for r in results["mass"]
        ]
        text.append(table(["depth", "without", "with", "at depth 0", "cost, of attention"], rows))
    if "linear" in results:
        a, b, c, r2 = fit(results["linear"])
        text.append(
            f"\n## What a slot costs\n\nTime per decoded token on the first model = {a:.2f} ms + {b:.3f} ms per 1000 "
            f"slots kept + {c:.3f} ms per 1000 evicted (least squares over the table, R² = {r2:.4f}):\n"
        )
        text.append(
            table(
                ["kept", "evicted before", "ms"],
                [[r["kept"], r["evicted"], f"{r['ms']:.2f}"] for r in results["linear"]],
            )
        )
    return "\n".join(text) + "\n"
