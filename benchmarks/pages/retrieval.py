"""Writes docs/retrieval.md from the results of retrieval_quality.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import at_commit, table

Row = dict[str, Any]

HEAD = """# What reading a part loses

Written by a command, which takes about an hour on two cores, goes on where it was stopped, and needs the evaluation
data (`--data`):

```console
$ python benchmarks/retrieval_quality.py
```

The model is SmolLM2-135M-Instruct with its weights as F32, for the needles a tiny one of the tests. *reads* names the
retriever and its tokens per head; `all` reads everything. Nothing is dropped unless a policy is named. A prompt and a
question are read over everything that is held, so that a retriever bounds the answer alone. Brackets are 95 % bootstrap
intervals over the cases; there are few cases, so they are wide."""


def write_page(results: Path, page: Path) -> None:
    """The page, from whatever parts have been measured; what was not is said to be missing."""
    found: dict[str, Any] = {}
    for path in sorted(results.glob("retrieval-*.json")):
        found[path.stem.removeprefix("retrieval-")] = json.loads(path.read_text())
    parts = [HEAD]
    commits = {name: of["commit"] if isinstance(of, dict) else commits_of(of) for name, of in found.items()}
    if commits:
        parts.append(at_commit(commits))
    for name, title, text in SECTIONS:
        body = "Not measured yet." if name not in found else f"{text}\n\n{TABLES[name](found[name])}"
        parts.append(f"## {title}\n\n{body}")
    page.write_text("\n\n".join(parts) + "\n", "utf-8")
    print(f"wrote {page}")


def commits_of(rows: Sequence[Row]) -> str:
    """The commits that measured rows, in order."""
    return ", ".join(dict.fromkeys(part for row in rows for part in row.get("commit", "").split(", ") if part))


SECTIONS = (
    (
        "kld",
        "Texts continued",
        "3,072 tokens of a novel read, 256 given; KL divergence from the cache that is read whole.",
    ),
    (
        "needle",
        "Needles",
        "One fact in a text of 1,024 to 8,000 tokens, asked for after it; share of the answers that "
        "hold it. Of the tiny model's four layers Quest reads everything in two.",
    ),
    ("ruler-4096", "RULER, 4,096 tokens", "The question comes after the document; mean share of what was expected."),
    ("ruler-8192", "RULER, 8,192 tokens", "As above."),
    (
        "mass",
        "Attention on what is read",
        "Share of the attention of a token that falls on what it reads, mean over layers and heads: 4,096 tokens of a "
        "novel, 32 sinks and the 64 newest always read, every KV head by itself: by the query of the same token or "
        "of the one before, as retrievers do; *the best*: by the attention itself.",
    ),
    (
        "speed",
        "Speed",
        "A novel is read and goes on; medians of the steps of five rounds in turns, two threads. A step is a token and "
        "the choice of what the next one reads; *choice* is its part of the step. *streaming* has evicted the rest.",
    ),
)


def _name(row: Row) -> list[str]:
    policy = "" if row["policy"] == "paged" else f"{row['policy']} {row['budget']}"
    return [policy or "all kept", row["reads"] or "all", f"{row['held']:.0%}"]


def _all(rows: Sequence[Row]) -> list[Row]:
    tasks = {row["task"] for row in rows}
    return [row for row in rows if row["task"] == "all" or len(tasks) == 1]


def _kld(rows: Sequence[Row]) -> str:
    cells = [
        [
            *_name(r),
            f"{r['kl']:.4f} [{r['ci_low']:.4f}, {r['ci_high']:.4f}]",
            f"{r['top1']:.1%}",
            f"{r['ppl_ratio']:.3f}",
        ]
        for r in _all(rows)
    ]
    return table(["kept", "reads", "held", "KL", "same likeliest token", "perplexity ratio"], cells)


def _score(rows: Sequence[Row]) -> str:
    cells = [[*_name(r), f"{r['score']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]", str(r["n"])] for r in _all(rows)]
    return table(["kept", "reads", "held", "score", "n"], cells)


def by_task(rows: Sequence[Row], heads: Sequence[str], name: Callable[[Row], list[str]], held: str) -> str:
    """A line per kind, which ``name`` says, with its score in every task; ``held``: the form of a share."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != "all"]
    kinds: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(name(row)), {})[row["task"]] = row
    cells = [
        [*kind, format(of["all"]["held"], held), *(f"{of[task]['score']:.2f}" for task in (*tasks, "all"))]
        for kind, of in kinds.items()
    ]
    return table([*heads, *tasks, "all"], cells)


def _ruler(rows: Sequence[Row]) -> str:
    return by_task(rows, ["kept", "reads", "held"], lambda row: _name(row)[:2], ".0%")


def _mass(found: Row) -> str:
    budgets = sorted({row["budget"] for row in found["rows"]})
    kinds: dict[tuple[str, int], dict[int, float]] = {}
    for row in found["rows"]:
        kinds.setdefault((row["by"], row["lag"]), {})[row["budget"]] = row["share"]
    cells = [
        [by, "before" if lag else "same", *(f"{of[budget]:.1%}" for budget in budgets)]
        for (by, lag), of in sorted(kinds.items())
    ]
    return table(["chosen by", "query of the token", *(f"{budget:,} read" for budget in budgets)], cells)


def _speed(found: Row) -> str:
    heads = ["tokens", "reads", "tokens/s", "x everything", "p50 ms", "p99 ms", "choice", "tokens read", "as before"]
    cells = [
        [
            *(f"{r['depth']:,}", r["reads"], f"{r['tokens_per_s']:.1f}", f"{r['ratio']:.2f}", f"{r['p50_ms']:.1f}"),
            *(f"{r['p99_ms']:.1f}", f"{r['choose_share']:.1%}", f"{r['read']:,.0f}"),
            "" if r["kept"] is None else f"{r['kept']:.0%}",
        ]
        for r in found["rows"]
    ]
    notes = [
        f"- {n['retriever']}, {n['depth']:,} tokens: what stands for its units took {n['prefill_share']:.2%} of the "
        f"time of reading them, and has {n['bytes_share']:.1%} of the bytes of K and V in f16."
        for n in found["index"]
    ]
    return f"`{found['command']}`, {found['model']}:\n\n{table(heads, cells)}\n\n" + "\n".join(notes)


TABLES = {"speed": _speed, "kld": _kld, "needle": _score, "ruler-4096": _ruler, "ruler-8192": _ruler, "mass": _mass}
