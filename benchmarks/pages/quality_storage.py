"""The storage sections of docs/results.md, and the picture: KL divergence over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import table
from quality_storage import AT_EQUAL_BYTES, LADDER, SHARES

Row = dict[str, Any]

PICTURE = "kl-over-bytes.svg"
STOCK = {"q8": "llama.cpp q8_0", "q4": "llama.cpp q4_0"}


def overall(rows: Sequence[Row]) -> list[Row]:
    """Over all tasks."""
    return [row for row in rows if row["task"] == "all"] or list(rows)


def share_of(row: Row) -> str:
    """The share of the bytes that a row was meant to hold."""
    return min(SHARES, key=lambda share: abs(float(share[:-1]) / 100 - row["held"]))


def by_share(rows: Sequence[Row], name: str) -> dict[str, Row]:
    """The rows of one way to evict and store, by share."""
    return {share_of(row): row for row in overall(rows) if row["policy"] == name}


def kept(rows: Sequence[Row]) -> dict[str, Row]:
    """What keeps everything, by storage; llama.cpp's own by the names in :data:`STOCK`."""
    named = {row["storage"]: row for row in overall(rows) if row["policy"] == "paged"}
    return named | {STOCK[row["storage"]]: row for row in overall(rows) if row["policy"] == "full"}


def storage_section(title: str, rows: Sequence[Row], more: Sequence[Row]) -> str:
    methods = [LADDER, *AT_EQUAL_BYTES]
    found = {name: by_share(rows, name) for name in methods}
    others = [name for name in methods if name != LADDER]
    factors = {
        share: min(found[name][share]["kl"] for name in others if share in found[name]) / found[LADDER][share]["kl"]
        for share in SHARES
    }
    n = overall(rows)[0]["n"]
    floor = max(row["floor"] for row in overall(rows) if row["policy"] != "full")
    parts = [
        title,
        f"KL divergence as below (3,072 tokens read, 256 given; {n} excerpts of two novels; noise floor {floor:.0e}), "
        "over the bytes of K and V that are held. At each share of a full f16 cache's bytes: the ladder; Ada-SnapKV, "
        "which drops the rest; and Ada-SnapKV with what is kept in q4, KIVI or LogQuant, so that more is kept. All "
        "protect 4 sinks and 32 recent tokens (LogQuant 33 to 48; the ladder 28). Thin lines: the policies of the "
        "table further below, on half as many excerpts.",
        f"![KL divergence over bytes]({PICTURE})",
        table(
            ["share of f16 bytes", *methods, "best other / ladder"],
            [
                [share, *(_cell(found[name].get(share)) for name in methods), f"{factors[share]:.1f}"]
                for share in SHARES
            ],
        ),
        "Empty: everything fits, see the next table.",
        "Nothing dropped, in the storages' own sinks and tails, beside llama.cpp's q8_0 and q4_0 (which it rotates as "
        "well; it attends to the quantized keys while it reads the prompt, with quantized queries; here the prompt is "
        f"read exactly); {overall(more)[0]['n']} of the excerpts:",
        table(
            ["storage", "share of f16 bytes", "KL", "same likeliest token"],
            [
                [name, f"{row['held']:.1%}", f"{row['kl']:.5f}", f"{row['top1']:.1%}"]
                for name, row in sorted(kept(more).items(), key=lambda item: -item[1]["held"])
                if "centre" not in name and not _is_claim(name)
            ],
        ),
        claims(more),
    ]
    return "\n\n".join(parts)


def _is_claim(name: str) -> bool:
    return name.startswith("kv") and "sink" in name


def _cell(row: Row | None) -> str:
    return f"{row['kl']:.4f} ({row['held']:.1%})" if row else ""


def claims(rows: Sequence[Row]) -> str:
    """What the figures say about expectations that were there before them."""
    kl = {name: row["kl"] for name, row in kept(rows).items()}
    held = {name: row["held"] for name, row in kept(rows).items()}

    def without(what: str) -> str:
        return ", ".join(f"{name} {kl[f'{name}:{what}']:.4f} against {kl[name]:.4f}" for name in ("kv3", "kv2"))

    return f"""What a simulation over 1,024 tokens expected, and what this says:

- kv3 has a seventh of protected KIVI's loss at fewer bytes: {kl["kv3"]:.4f} at {held["kv3"]:.1%} against
  {kl["kivi:sink=32"]:.4f} at {held["kivi:sink=32"]:.1%}, a factor of {kl["kivi:sink=32"] / kl["kv3"]:.1f}.
- q4 has a third of llama.cpp's q4_0's loss: {kl["q4"]:.4f} against {kl["llama.cpp q4_0"]:.4f}, a factor of
  {kl["llama.cpp q4_0"] / kl["q4"]:.1f}.
- LogQuant loses no more than KIVI at equal bytes: {kl["logquant"]:.4f} at {held["logquant"]:.1%} against
  {kl["kivi"]:.4f} at {held["kivi"]:.1%}; with 32 sinks {kl["logquant:sink=32"]:.4f} against
  {kl["kivi:sink=32"]:.4f}.
- The mean of the keys pays; without it: {without("centre=0")}; q4 {kl["q4:centre=0"]:.4f} against {kl["q4"]:.4f}.
- So do sinks; without any: {without("sink=0")}; with 4 instead of 32: {without("sink=4")}.
- The third bit of the keys pays: kv3 {kl["kv3"]:.4f} at {held["kv3"]:.1%}, kv2 {kl["kv2"]:.4f} at {held["kv2"]:.1%}."""


def ruler_section(title: str, rows: Sequence[Row]) -> str:
    methods = [LADDER, *AT_EQUAL_BYTES]
    found = {name: by_share(rows, name) for name in methods}
    full = kept(rows)
    return "\n\n".join(
        [
            title,
            f"{overall(rows)[0]['n']} prompts: seven tasks, five rows each; the eviction sees the question. Share of "
            f"the expected strings found; with nothing evicted and f16 {full['f16']['score']:.2f}.",
            table(
                ["share of f16 bytes", *methods],
                [
                    [share, *(f"{r['score']:.2f}" if (r := found[name].get(share)) else "" for name in methods)]
                    for share in SHARES
                ],
            ),
            "Nothing dropped: "
            + ", ".join(f"{name} {row['score']:.2f} at {row['held']:.0%}" for name, row in full.items())
            + ".",
        ]
    )


def draw(rows: Sequence[Row], more: Sequence[Row], policies: Sequence[Row], path: Path) -> None:
    """KL divergence over the share of bytes held, a line per method, a mark per storage that keeps everything.

    ``policies``: the rows of all policies in f16, drawn thinly; random ones left out.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    label = "other policies, f16 (table below)"
    for name in dict.fromkeys(row["policy"] for row in policies):
        mine = sorted((r for r in overall(policies) if r["policy"] == name), key=lambda row: float(row["held"]))
        mine = [row for row in mine if 0.03 < row["held"] < 0.6]
        if name.startswith("random") or name in (LADDER, *AT_EQUAL_BYTES) or len(mine) < 2:
            continue
        x, y = [100 * row["held"] for row in mine], [row["kl"] for row in mine]
        axes.plot(x, y, color="0.75", linewidth=0.8, zorder=0, label=label)
        label = "_"
    for name in (LADDER, *AT_EQUAL_BYTES):
        mine = sorted(by_share(rows, name).values(), key=lambda row: float(row["held"]))
        x, y = [100 * row["held"] for row in mine], [row["kl"] for row in mine]
        width = 2.5 if name == LADDER else 1.2
        (line,) = axes.plot(x, y, marker="o", markersize=4, linewidth=width, label=name)
        low, high = [row["ci_low"] for row in mine], [row["ci_high"] for row in mine]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    for name, row in (kept(more) | kept(rows)).items():
        if row["kl"] <= 0 or ":" in name or name == "f16":
            continue
        mark = "s" if name in STOCK.values() else "^"
        axes.plot(100 * row["held"], row["kl"], mark, color="black", markersize=5)
        axes.annotate(f" {name}", (100 * row["held"], row["kl"]), fontsize=8, va="bottom")
    axes.set(yscale="log", xlabel="share of a full f16 cache's bytes, %", ylabel="KL divergence, nats per token")
    axes.set_xlim(3, 63)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    # the same figures give the same file
    with rc_context({"svg.hashsalt": "kvlocal"}):
        figure.savefig(path, metadata={"Date": None})
