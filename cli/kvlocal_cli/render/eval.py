"""What `kvlocal eval` prints: a table for people, as Markdown or drawn; JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlocal_cli.render.controls import plain, plain_json
from kvlocal_cli.render.markdown import markdown_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvlocal.eval.evaluation import Step

Row = Mapping[str, Any]
About = Mapping[str, Any]

NOTHING_EVICTED = ("full", "paged")
FEW = 20
"""Cases below which a bootstrap interval is too narrow."""


class Column(NamedTuple):
    """A column of the table: names stand to the left, numbers to the right."""

    title: str
    is_name: bool
    cell: Callable[[Row], str]


def as_json(about: About, rows: Sequence[Row]) -> str:
    """One object: what was measured, how, where, and all results."""
    values = {**about, "results": rows}
    return plain_json(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=str)) + "\n"


def as_csv(_about: About, rows: Sequence[Row]) -> str:
    """The results, one line each; parameters of the policy as JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "policy_args": json.dumps(row["policy_args"])} for row in rows)
    return plain(file.getvalue())


def as_md(about: About, rows: Sequence[Row]) -> str:
    """A heading, a table whose source is aligned too, and how to read it."""
    columns = _columns(about["metric"], rows)
    table = markdown_table(_heads(columns), _cells(columns, rows))
    return f"{plain(_heading(about, rows))}\n\n{table}\n{_note(about['metric'], rows)}\n"


def as_rich(about: About, rows: Sequence[Row], width: int) -> list[RenderableType]:
    """The same for a terminal that is `width` columns wide."""
    from rich.text import Text

    from kvlocal_cli.render.table import results_table

    columns = _columns(about["metric"], rows)
    table = results_table(_heads(columns), _cells(columns, rows), width)
    return [Text(_heading(about, rows)), "", table, "", Text(_note(about["metric"], rows), "dim")]


def case_text(step: Step) -> str:
    """`3/40 · niah_single_1/2`."""
    return " · ".join(filter(None, [f"{step.done:,}/{step.total:,}", step.what]))


def _heads(columns: Sequence[Column]) -> list[tuple[str, bool]]:
    return [(column.title, column.is_name) for column in columns]


def _cells(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    return [[column.cell(row) for column in columns] for row in rows]


def _columns(metric: str, rows: Sequence[Row]) -> list[Column]:
    """What tells the rows apart, then what was measured; no column that says the same everywhere."""

    def varies(key: str) -> bool:
        return len({row[key] for row in rows}) > 1

    def name(title: str, key: str) -> Column:
        return Column(title, True, lambda row: str(row[key]))

    names = [
        (varies("task"), name("task", "task")),
        (True, name("policy", "policy")),
        (varies("storage"), name("kv", "storage")),
        (True, name("budget", "budget")),
        (varies("prefill"), name("prefill", "prefill")),
        (varies("guide"), Column("guide", False, lambda row: f"{row['guide']:,}")),
        (varies("reads"), Column("reads", True, lambda row: row["reads"] or "all")),
        (varies("recalls"), Column("recalls", True, lambda row: row["recalls"] or "none")),
        (varies("question"), name("question", "question")),
        (True, Column("held", False, lambda row: f"{row['held']:.1%}")),
    ]
    n = Column("n", False, lambda row: f"{row['n']:,}")
    return [column for wanted, column in names if wanted] + [*_measures(metric, rows), n]


def _measures(metric: str, rows: Sequence[Row]) -> list[Column]:
    def number(title: str, key: str, form: str) -> Column:
        return Column(title, False, lambda row: format(row[key], form))

    def between(title: str, key: str, form: Callable[[float], str]) -> Column:
        ends = ("ci_low", "ci_high")
        return Column(title, False, lambda row: f"{form(row[key])} [{', '.join(form(row[end]) for end in ends)}]")

    if metric == "kld":
        floor = Column("floor", False, lambda row: _small(row["floor"]))
        ratio = number("ppl ratio", "ppl_ratio", ".3f")
        return [between("KL", "kl", _small), floor, number("top-1", "top1", ".1%"), ratio]
    if metric == "ppl":
        return [number("ppl", "ppl", ".2f"), between("ratio", "ppl_ratio", "{:.3f}".format)]
    if metric == "summarize":
        rouge = [number(f"ROUGE-{n}", f"rouge{n}", ".3f") for n in (1, 2)]
        return [*rouge, between("ROUGE-L", "score", "{:.3f}".format)]
    score = [between("score", "score", "{:.2f}".format)]
    if "score_first" in rows[0]:
        score += [number("first", "score_first", ".2f"), number("later", "score_later", ".2f")]
    return score


def _small(value: float) -> str:
    """Four decimals, or the size of what they do not show."""
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}" if value else "0"


def _heading(about: About, rows: Sequence[Row]) -> str:
    """The model, what was measured, and what the columns leave out because it is the same everywhere."""

    def same(key: str) -> str:
        values = {str(row[key]) for row in rows}
        return values.pop() if len(values) == 1 else ""

    parts = [about["model"], "F32 weights" if about["settings"]["f32"] else "", about["metric"]]
    # a metric with one kind of case is named like it
    parts += [same("task") if same("task") != about["metric"] else ""]
    parts += [f"{same('prefill')} prefill" if same("prefill") == "chunked" else ""]
    parts += [f"guide {same('guide')}" if same("guide") not in ("", "0") else ""]
    parts += [f"reads {same('reads')}" if same("reads") else ""]
    parts += [f"recalls {same('recalls')}" if same("recalls") else ""]
    parts += [f"question {same('question')}" if same("question") else ""]
    return " · ".join(filter(None, parts))


_READ = {
    "kld": "KL: nats, against the same cache with nothing evicted. floor: the same variant once more in other batches; "
    "a difference below it is not a result. top-1: how often the likeliest token is the same.",
    "ppl": "ratio: perplexity over that of the same cache with nothing evicted.",
    "summarize": "ROUGE: F-measures against the reference summary, 0 to 1.",
}
_SCORE = "score: share of what was expected that the answer holds, 0 to 1."
_FIRST = "first: the first question; later: those after it, which the first eviction never saw."


def _note(metric: str, rows: Sequence[Row]) -> str:
    """How to read the table."""
    parts = [_READ.get(metric, _SCORE)]
    if "score_first" in rows[0]:
        parts.append(_FIRST)
    if any(row["question"] == "after" for row in rows):
        parts.append("question: inside, the eviction saw it; after, it saw only the document.")
    share = "mean share of a full f16 cache while it grows" if metric == "ppl" else "share of a full f16 cache"
    parts.append(f"held: {share}. [ ]: 95 % bootstrap interval over cases")
    parts[-1] += f", too narrow for fewer than {FEW}." if any(row["n"] < FEW for row in rows) else "."
    if metric not in ("kld", "ppl") and not any(row["policy"] in NOTHING_EVICTED for row in rows):
        parts.append("With paged among the policies, the table also shows the score when nothing is evicted.")
    return " ".join(parts)
