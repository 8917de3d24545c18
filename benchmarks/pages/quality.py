"""Writes docs/results.md from the results of quality.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import at_commit, table

from pages.quality_storage import PICTURE, draw, ruler_section, storage_section
from pages.storage import sections

Row = dict[str, Any]


def write_page(results: Path, page: Path, model: str) -> None:
    """The page, from whatever parts have been measured; what was not is said to be missing."""
    found = {}
    for path in sorted(results.glob("quality-*.json")):
        found[path.stem.removeprefix("quality-")] = json.loads(path.read_text())
    parts = [HEAD.format(model=model)]
    if found:
        parts.append(at_commit({name: _commits(rows) for name, rows in found.items()}))
    for name, section in SECTIONS.items():
        parts.append(section(found) if name in found else f"{TITLES[name]}\n\nNot measured yet.")
        if name == "storage_ruler":
            parts.append(sections(results))
    if "storage" in found:
        draw(
            found["storage"],
            found["storage_kept"],
            found.get("kld", []),
            page.parent / PICTURE,
        )
    page.write_text("\n\n".join(parts).rstrip() + "\n")
    print(f"wrote {page}")


def _commits(rows: Sequence[Row]) -> str:
    """Those of all rows; what was measured bit by bit may have several."""
    return ", ".join(dict.fromkeys(part for row in rows for part in row.get("commit", "").split(", ") if part))


HEAD = """# What every policy loses

Every figure here was written by a command. A section that names none is the work of this one, which takes some three
hours on two cores, goes on where it was stopped, and needs the evaluation data (`--data`):

```console
$ python benchmarks/quality.py
```

The model is {model}, with its weights dequantized to F32
(`kvlocal eval` does that for the default model), so that differences between kernels and batches stay below what is
measured. A budget is the share of the text's tokens that every layer and KV head holds on average (for the ladder, of
the bytes they take in f16); *held* is the share of the bytes of a full f16 cache that was really held
after the eviction. Brackets are 95 % bootstrap intervals over the cases; there are few cases, so they are wide. The
same is measured on your own texts and models by `kvlocal eval`."""

TITLES = {
    "storage": "## Dropped, or stored in fewer bits: KL divergence over bytes",
    "storage_ruler": "## RULER, 4k, at equal bytes",
    "kld": "## Texts continued: KL divergence",
    "kld-buzz": "## BUZZ against others at the size it has",
    "ppl": "## A long continuation: perplexity",
    "ruler": "## RULER, 4k",
    "kv": "## Key-value retrieval",
    "summaries": "## Summaries",
    "guide": "## Chunked prefill, with and without a guide",
    "growth": "## Memory over ten thousand tokens",
}


def _budget(row: Row) -> str:
    return "" if row["policy"] in ("paged", "full") else row["budget"]


def _sorted(rows: Sequence[Row]) -> list[tuple[str, dict[str, Row]]]:
    """Rows by policy, then by budget; in the order of the first appearance."""
    out: dict[str, dict[str, Row]] = {}
    for row in rows:
        out.setdefault(row["policy"], {})[_budget(row)] = row
    return list(out.items())


def _interval(row: Row, name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def _grid(rows: Sequence[Row], cell: Callable[[Row], str], budgets: Sequence[str]) -> str:
    """A line per policy, a column per budget; what does not evict has one figure."""
    lines = []
    for policy, by_budget in _sorted(rows):
        if "" in by_budget:
            lines.append([policy, cell(by_budget[""]), *[""] * (len(budgets) - 1)])
        else:
            lines.append([policy, *(cell(by_budget[b]) if b in by_budget else "" for b in budgets)])
    return table(["policy", *budgets], lines)


def _only(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _budgets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(b for row in rows if (b := _budget(row))))


def _overall(rows: Sequence[Row]) -> list[Row]:
    return _only(rows, task="all") or list(rows)


def _kld(found: dict[str, list[Row]]) -> str:
    rows = _overall(found["kld"])
    full = {row["policy"]: row for row in rows}["full"]
    floor = max(row["floor"] for row in rows if row["policy"] != "full")
    text = f"""{TITLES["kld"]}

3,072 tokens of a novel are read and evicted, the next 256 are given one after the other. KL divergence (nats, mean
over the tokens) of the predictions from those of the same cache with nothing evicted; {full["n"]} excerpts of two
novels. The same variant in other batches, and so through other kernels, differs from itself by at most {floor:.1e}
(the noise floor); llama.cpp's own cache and kernels differ from ours with nothing evicted by {full["kl"]:.5f}, and from
themselves in other batches by {full["floor"]:.5f}.

"""
    budgets = _budgets(rows)
    text += _grid(rows, lambda r: _interval(r, "kl", 3), budgets)
    text += "\n\nShare of the positions whose likeliest token stays the same, and ratio of the perplexities:\n\n"
    text += _grid(rows, lambda r: f"{r['top1']:.1%}, {r['ppl_ratio']:.3f}", budgets)
    text += "\n\nHeld, and seconds of the eviction:\n\n"
    text += _grid(rows, lambda r: f"{r['held']:.1%}, {r['evict_s']:.2f} s", budgets)
    return "\n\n".join([text, *_by_task(found["kld"], "kl", 3), _claims(found)])


def _by_task(rows: Sequence[Row], name: str, digits: int) -> list[str]:
    out = []
    for task in dict.fromkeys(row["task"] for row in rows if row["task"] != "all"):
        mine = _only(rows, task=task)
        out.append(f"{task}:\n\n" + _grid(mine, lambda r: f"{r[name]:.{digits}f}", _budgets(mine)))
    return out


def _claims(found: dict[str, list[Row]]) -> str:
    """What the table says about expectations that were there before it."""
    rows = _overall(found["kld"])
    kl = {(row["policy"], _budget(row)): row["kl"] for row in rows}
    budgets = _budgets(rows)
    policies = [p for p in dict.fromkeys(row["policy"] for row in rows) if p not in ("full", "paged")]

    def against(a: str, b: str) -> str:
        return ", ".join(f"{kl[a, x]:.3f} against {kl[b, x]:.3f} at {x}" for x in budgets)

    def no_better(than: str) -> str:
        named = [f"{p} at {x}" for p in policies for x in budgets if p != than and kl[p, x] >= kl[than, x]]
        return ", ".join(named) or "none"

    return f"""### What was expected

- No method may lose to `random`. Not below it: {no_better("random")}. `random` evicts the first tokens, which every
  head needs; against random tokens that keep four sinks, not below: {no_better("random, 4 sinks")}.
- Ada-SnapKV is no worse than SnapKV: {against("ada-snapkv", "snapkv")}.
- A simulation over 1,000 tokens had SnapKV better without pooling. Over 3,072, with pooling against without:
  {against("snapkv", "snapkv, no pooling")}.
- It had pyramid budgets lose to equal ones on this small model: {against("pyramidkv", "snapkv")}.
- It had keydiff and knorm near random at half of the cache: {kl["keydiff", "50%"]:.3f} and
  {kl["knorm", "50%"]:.3f}, random with sinks {kl["random, 4 sinks", "50%"]:.3f}."""


def _kld_buzz(found: dict[str, list[Row]]) -> str:
    rows = [row for row in _overall(found["kld-buzz"]) if row["policy"] != "paged"]
    rows.sort(key=lambda row: (round(row["held_tokens"]), row["policy"]))
    lines = [
        [row["policy"], row["budget"], f"{row['held_tokens']:.0f}", _interval(row, "kl", 3), f"{row['top1']:.1%}"]
        for row in rows
    ]
    return (
        f"{TITLES['kld-buzz']}\n\nThe size of BUZZ swings around its budget, so right after a prompt it can be far "
        "from it. The others with as many tokens as BUZZ held, on the same excerpts:\n\n"
        + table(["policy", "budget", "tokens held", "KL", "same likeliest"], lines)
        + "\n\nBUZZ was expected to be no worse than streaming at equal bytes: the rows of equal size say whether it "
        "is. What it loses to the others has two reasons. Its window of 160 tokens is short: the rows with a longer "
        "window and a thinner sample of what is older, of about the same size, are better. And it keeps one token of "
        "every five, evenly over the whole text, where H2O ranks by the same attention but may keep neighbours."
    )


def _ppl(found: dict[str, list[Row]]) -> str:
    rows = _overall(found["ppl"])
    return (
        f"{TITLES['ppl']}\n\n1,024 tokens are read and evicted, the next 1,024 follow, with an eviction whenever one "
        "is due (every 32 tokens). Ratio of the perplexity to that with nothing evicted, and the tokens held on "
        f"average meanwhile; {rows[0]['n']} excerpts.\n\n"
        + _grid(rows, lambda r: f"{r['ppl_ratio']:.4f}, {r['held_tokens']:.0f}", _budgets(rows))
    )


ASKED = {
    "inside": "The question stands in the prompt, and the eviction sees it:",
    "after": "The eviction has seen the document only, the question comes afterwards:",
}


def _asked(name: str, what: str) -> Callable[[dict[str, list[Row]]], str]:
    def section(found: dict[str, list[Row]]) -> str:
        rows = found[name]
        parts = [TITLES[name], what.format(n=_overall(rows)[0]["n"])]
        if not any(row["score"] for row in rows if row["policy"] == "paged"):
            return "\n\n".join(
                [*parts, "The model answers none of them with the full cache, and with no policy either."]
            )
        for mode, sentence in ASKED.items():
            mine = _overall(_only(rows, question=mode))
            if mine:
                parts += [sentence, _grid(mine, lambda r: _interval(r, "score", 2), _budgets(mine))]
        tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] != "all"))
        if len(tasks) > 1:
            for budget in _budgets(rows):
                for mode in ASKED:
                    mine = [r for r in _only(rows, question=mode) if _budget(r) in ("", budget)]
                    parts.append(f"By task at {budget}, question {mode}:")
                    lines = []
                    for policy in dict.fromkeys(r["policy"] for r in mine):
                        scores = {r["task"]: r["score"] for r in mine if r["policy"] == policy}
                        lines.append([policy, *(f"{scores[task]:.2f}" for task in tasks)])
                    parts.append(table(["policy", *tasks], lines))
        return "\n\n".join(parts)

    return section


def _summaries(found: dict[str, list[Row]]) -> str:
    rows = _overall(found["summaries"])
    return (
        f"{TITLES['summaries']}\n\n{rows[0]['n']} articles of CNN/DailyMail, at most 128 tokens, likeliest token "
        "each time; ROUGE-L with its interval, ROUGE-1, ROUGE-2 (F-measures, in %). A model of this size writes poor "
        "summaries with the full cache, too.\n\n"
        + _grid(
            rows,
            lambda r: (
                f"{r['rougeL'] * 100:.1f} [{r['ci_low'] * 100:.1f}, {r['ci_high'] * 100:.1f}], "
                f"{r['rouge1'] * 100:.1f}, {r['rouge2'] * 100:.1f}"
            ),
            _budgets(rows),
        )
    )


def _guide(found: dict[str, list[Row]]) -> str:
    rows = _overall(found["guide"])
    lines = []
    for row in rows:
        how = row["prefill"] + (f", guide {row['guide']}" if row["guide"] else "")
        lines.append([row["policy"], "" if row["policy"] == "paged" else how, _budget(row), _interval(row, "score", 2)])
    return (
        f"{TITLES['guide']}\n\nSingle needles of RULER-4k ({rows[0]['n']} prompts), the question inside. Chunked "
        "prefill evicts after every 512 tokens and never holds more than the budget and a chunk; with a guide, the "
        "last 64 tokens of the prompt decide each time.\n\n" + table(["policy", "prefill", "budget", "score"], lines)
    )


def _growth(found: dict[str, list[Row]]) -> str:
    def mib(n: float) -> str:
        return f"{n / 2**20:.2f}"

    lines = [
        [r["policy"], r["tokens"], r["evictions"], mib(r["first"]), mib(r["last"]), mib(r["full"])]
        for r in found["growth"]
    ]
    return (
        f"{TITLES['growth']}\n\nAn answer of 10,000 tokens by the small model of the tests, after a prompt of "
        "1,024, at `--budget 256`: the most that the pools had allocated in the first and in the last thousand tokens "
        "(MiB), against a full cache.\n\n"
        + table(["policy", "tokens", "evictions", "first thousand", "last thousand", "full cache"], lines)
    )


SECTIONS: dict[str, Callable[[dict[str, list[Row]]], str]] = {
    "storage": lambda found: storage_section(TITLES["storage"], found["storage"], found["storage_kept"]),
    "storage_ruler": lambda found: ruler_section(TITLES["storage_ruler"], found["storage_ruler"]),
    "kld": _kld,
    "kld-buzz": _kld_buzz,
    "ppl": _ppl,
    "ruler": _asked(
        "ruler",
        "{n} prompts: seven tasks, five rows each, about 3,800 tokens. Share of the expected strings found in an "
        "answer of at most 48 tokens.",
    ),
    "kv": _asked(
        "kv",
        "{n} prompts with 75 pairs of random keys and values (5,400 tokens); the value must be right to the letter.",
    ),
    "summaries": _summaries,
    "guide": _guide,
    "growth": _growth,
}
