"""Writes docs/archive.md from the results of archive_quality.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import at_commit, table

from pages.retrieval import by_task, commits_of

Row = dict[str, Any]

HEAD = """# What an archive brings back

Written by a command, which goes on where it was stopped and needs the evaluation data (`--data`):

```console
$ python benchmarks/archive_quality.py
```

Every question comes after the document, of which the policy has kept what it keeps without knowing the question.
*recalls*: tokens per head that a question brings back from the archive on disk (`--archive`), exact, before it is read
once more; `step`: what the retriever reads at every token. *memory* is what is then held in memory, what was recalled
included, as a share of a full f16 cache; with `step` what stands for the units in memory (3 to 6 % of f16) comes on
top. Brackets are 95 % bootstrap intervals over the cases. The needles and the chat are those of the
tiny model of the tests, RULER that of SmolLM2-135M-Instruct with its weights as F32."""


def write_page(results: Path, page: Path) -> None:
    """The page, from whatever parts have been measured; what was not is said to be missing."""
    found = {
        path.stem.removeprefix("archive-"): json.loads(path.read_text()) for path in results.glob("archive-*.json")
    }
    parts = [HEAD]
    commits = {name: of["commit"] if isinstance(of, dict) else commits_of(of) for name, of in sorted(found.items())}
    if commits:
        parts.append(at_commit(commits))
    for name, (title, text, write) in SECTIONS.items():
        body = "Not measured yet." if name not in found else f"{text}\n\n{write(found[name])}"
        parts.append(f"## {title}\n\n{body}")
    page.write_text("\n\n".join(parts) + "\n", "utf-8")
    print(f"wrote {page}")


def _name(row: Row) -> list[str]:
    policy = "everything" if row["policy"] in ("paged", "full") else f"{row['policy']} {row['budget']}"
    recalls = row["recalls"] or "-"
    return [policy, recalls if recalls != "step" else f"step, {row['reads']}"]


def _score(rows: Sequence[Row]) -> str:
    tasks = {row["task"] for row in rows}
    cells = [
        [
            *_name(r),
            f"{r['held']:.1%}",
            f"{r['score']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]",
            str(r["n"]),
        ]
        for r in rows
        if r["task"] == "all" or len(tasks) == 1
    ]
    return table(["kept", "recalls", "memory", "score", "n"], cells)


def _ruler(rows: Sequence[Row]) -> str:
    return by_task(rows, ["kept", "recalls", "memory"], _name, ".1%")


def _chat(found: Row) -> str:
    cells = [
        [
            *_name(r),
            f"{r['n_document']:,}",
            f"{r['n_tokens']:,}",
            f"{r['used_bytes'] / r['full_bytes']:.1%}",
            f"{r['archive_bytes'] / 2**20:.1f}",
            f"{r['right']} of {r['turns']}",
        ]
        for r in found["rows"]
    ]
    heads = ["kept", "recalls", "tokens of the first turn", "at the end", "memory", "on disk, MiB", "right"]
    return table(heads, cells)


def _speed(found: Row) -> str:
    cells = [
        [
            *(f"{r['depth']:,}", f"{r['write_s']:.2f}", f"{r['write_share']:.1%}", f"{r['bytes'] / 2**20:,.0f}"),
            *(f"{r['question_s']:.2f}", f"{r['recall_s']:.2f}", f"{r['recalled']:.0f}", f"{r['step_ms']:.1f}"),
            *(f"{r['recalled_step_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['by_step_ms']:.1f}"),
            *(f"{r['by_step_p99_ms']:.1f}", f"{r['read_bytes'] / 2**20:.2f}", f"{r['missed']:.0f}"),
        ]
        for r in found["rows"]
    ]
    heads = ["tokens", "writing, s", "of reading them", "on disk, MiB", "question, s", "with recall, s", "recalled"]
    words = table([*heads, "token, ms", "after a recall", "p99", "by step", "p99", "read, MiB", "missed"], cells)
    return f"`{found['command']}`, {found['model']}:\n\n{words}"


SECTIONS = {
    "needle": (
        "Needles",
        "One fact in a text of 1,024 to 8,000 tokens; share of the answers that hold it.",
        _score,
    ),
    "chat": ("A chat of thirty turns", "Every turn asks for another code of the document.", _chat),
    "ruler-4096": ("RULER, 4,096 tokens", "Mean share of what was expected.", _ruler),
    "ruler-8192": ("RULER, 8,192 tokens", "As above; the model itself finds next to nothing at this length.", _ruler),
    "speed": (
        "Time",
        "A novel is read, evicted to 1,024 tokens per head by `streaming`, and asked about; medians of five rounds in "
        "turns, two threads. *Writing* is what the archive adds to the eviction. *With recall*: all keys on disk are "
        "looked at, 256 tokens per head brought back, and the question read once more. *By step*: `sentencekv 1024` "
        "reads at every token, from memory and from the disk; *read* and *missed* (tokens per head) are of one token.",
        _speed,
    ),
}
