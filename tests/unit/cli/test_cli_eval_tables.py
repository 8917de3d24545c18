"""What `kvlocal eval` prints of a measurement that is made up: tables, files, progress."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import call
from fake_eval import MACHINE, NEEDLES, ROUGE, TEXTS, FakeEval, found
from kvlocal_cli.render import eval as eval_output
from kvlocal_cli.render import screen as render
from kvlocal_cli.render.eval import case_text
from kvlocal_cli.render.screen import Screen
from rich.console import Console

from kvlocal.eval import records
from kvlocal.eval.evaluation import Step
from kvlocal.eval.records import Record


def test_a_table_of_divergences_has_intervals_and_floors(fake_eval: FakeEval, novel: str) -> None:
    fake_eval.records = TEXTS
    result = call("eval", "kld", "--text", novel)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "tiny · F32 weights · kld · kld-task\n"
        "\n"
        "| policy | budget |   held |                      KL |   floor |  top-1 | ppl ratio |   n |\n"
        "| ------ | ------ | -----: | ----------------------: | ------: | -----: | --------: | --: |\n"
        "| paged  | 100%   | 100.0% |                0 [0, 0] |       0 | 100.0% |     1.000 |   1 |\n"
        "| snapkv | 25%    |  25.0% | 0.3750 [0.2500, 0.5000] | 1.5e-05 |  75.0% |     1.250 |   2 |\n"
        "\n"
        "KL: nats, against the same cache with nothing evicted. floor: the same variant once more in other batches;"
        " a difference below it is not a result. top-1: how often the likeliest token is the same."
        " held: share of a full f16 cache. [ ]: 95 % bootstrap interval over cases, too narrow for fewer than 20.\n"
    )


def test_a_table_of_scores_tells_the_questions_apart(fake_eval: FakeEval) -> None:
    result = call("eval", "needle", "m.gguf")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "tiny · needle · needle-task\n"
        "\n"
        "| policy | budget | question |   held |             score |   n |\n"
        "| ------ | ------ | -------- | -----: | ----------------: | --: |\n"
        "| paged  | 100%   | inside   | 100.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| snapkv | 25%    | inside   |  25.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| paged  | 100%   | after    | 100.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| snapkv | 25%    | after    |  25.0% | 0.50 [0.50, 0.50] |   2 |\n"
        "\n"
        "score: share of what was expected that the answer holds, 0 to 1. question: inside, the eviction saw it;"
        " after, it saw only the document. held: share of a full f16 cache."
        " [ ]: 95 % bootstrap interval over cases, too narrow for fewer than 20.\n"
    )


def printed(
    fake_eval: FakeEval, *found: Record, metric: str = "needle", args: Sequence[str] = ()
) -> tuple[str, list[str], str]:
    """Heading, titles of the columns and note of a table."""
    fake_eval.records = found
    heading, _, titles, *_, note = call("eval", metric, *args).stdout.splitlines()
    return heading, [cell.strip() for cell in titles.strip("|").split("|")], note


def test_columns_that_say_the_same_everywhere_go_into_the_heading(fake_eval: FakeEval) -> None:
    chunked = found("snapkv", {"score": 1.0}, question="inside", prefill="chunked", guide=64)
    heading, titles, _ = printed(fake_eval, chunked)
    assert heading == "tiny · F32 weights · needle · needle-task · chunked prefill · guide 64 · question inside"
    assert titles == ["policy", "budget", "held", "score", "n"]
    exact = found("snapkv", {"score": 1.0}, question="after", task="other", storage="q8")
    heading, titles, _ = printed(fake_eval, chunked, exact)
    assert heading == "tiny · F32 weights · needle"
    assert titles == ["task", "policy", "kv", "budget", "prefill", "guide", "question", "held", "score", "n"]


def test_every_metric_has_its_own_columns_and_note(fake_eval: FakeEval, novel: str, tmp_path: Path) -> None:
    ppl = found("snapkv", {"ppl": 20.0, "ppl_ratio": 1.5}, metric="ppl")
    _, titles, note = printed(fake_eval, ppl, metric="ppl", args=["--text", novel])
    assert titles[2:] == ["held", "ppl", "ratio", "n"]
    assert note.startswith("ratio: perplexity over that of ") and "held: mean share " in note

    file = tmp_path / "news.jsonl"
    file.write_text('{"article": "It rained.", "highlights": "Rain."}\n')
    args = ["--data", str(file)]
    _, titles, note = printed(fake_eval, found("snapkv", ROUGE, metric="summarize"), metric="summarize", args=args)
    assert titles[2:] == ["held", "ROUGE-1", "ROUGE-2", "ROUGE-L", "n"]
    assert "0.500 |   0.250 | 0.375 [0.375, 0.375]" in call("eval", "summarize", *args).stdout

    turns = found("snapkv", {"score": 0.5, "score_first": 1.0, "score_later": 0.25})
    _, titles, note = printed(fake_eval, turns)
    assert titles[2:] == ["held", "score", "first", "later", "n"] and "first: the first question; later: " in note


def test_the_note_says_what_the_table_lacks(fake_eval: FakeEval) -> None:
    few = found("snapkv", {"score": 1.0})
    assert printed(fake_eval, few)[2].endswith("shows the score when nothing is evicted.")
    assert "paged" not in printed(fake_eval, few, found("paged", {"score": 1.0}))[2]
    assert "too narrow" in printed(fake_eval, few)[2]
    many = [found("snapkv", {"score": 1.0}, case=i) for i in range(20)]
    assert "too narrow" not in printed(fake_eval, *many)[2]
    assert "after" not in printed(fake_eval, few)[2]


def test_json_is_what_was_measured_how_and_where(fake_eval: FakeEval, novel: str) -> None:
    fake_eval.records = TEXTS
    result = call("eval", "kld", "m.gguf", "--text", novel, "--contexts", "2", "-ub", "128", "-o", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert list(shown) == ["metric", "model", "settings", "machine", "results"]
    assert (shown["metric"], shown["model"], shown["machine"]) == ("kld", "tiny", MACHINE)
    assert shown["settings"] == {
        "f32": False,
        "chunk": 512,
        "evict_every": 32,
        "n_ubatch": 128,
        "n_gpu_layers": 0,
        "kernels": "auto",
        "parallel": 16,
        "texts": [novel],
        "n_context": 3072,
        "n_continue": 256,
        "per_text": 2,
    }
    assert shown["results"] == records.rows(TEXTS)
    shown = json.loads(call("eval", "needle", "--lengths", "64", "--ask", "after", "-o", "json").stdout)
    assert shown["settings"]["questions"] == ["after"] and shown["settings"]["lengths"] == [64]


def test_csv_has_a_line_per_row_and_parameters_as_json(fake_eval: FakeEval) -> None:
    text = call("eval", "needle", "-o", "csv").stdout
    assert text.splitlines()[:3] == [
        "metric,task,policy,policy_args,storage,budget,prefill,guide,reads,recalls,question,held_tokens,used_bytes,full_bytes,"
        "held,evict_s,score,ci_low,ci_high,n,commit",
        "needle,needle-task,paged,{},f16,100%,exact,0,,,inside,400.0,4194304.0,4194304.0,1.0,0.0,1.0,1.0,1.0,2,",
        'needle,needle-task,snapkv,"{""window"": 8}",f16,25%,exact,0,,,inside,100.0,1048576.0,4194304.0,0.25,0.5,1.0,'
        "1.0,1.0,2,",
    ]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 4 and json.loads(rows[1]["policy_args"]) == {"window": 8} and "\r" not in text


def test_output_goes_into_a_file_when_one_is_named(fake_eval: FakeEval, tmp_path: Path) -> None:
    expected = call("eval", "needle").stdout
    result = call("eval", "needle", "--output-file", str(tmp_path / "needle.md"))
    assert (result.stdout, result.stderr) == ("", "")
    assert (tmp_path / "needle.md").read_text("utf-8") == expected


def test_the_table_of_a_terminal_has_the_same_cells() -> None:
    about = {"metric": "needle", "model": "tiny [1B]", "settings": {"f32": True}}
    text = io.StringIO()
    Console(file=text, width=120).print(*eval_output.as_rich(about, records.rows(NEEDLES), 120), sep="\n")
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[0] == "tiny [1B] · F32 weights · needle · needle-task"
    assert lines[2] == "policy budget question held score n"
    assert lines[7] == "snapkv 25% after 25.0% 0.50 [0.50, 0.50] 2"
    assert " ".join(lines[9:]).startswith("score: share of what was expected")


def test_a_terminal_gets_the_drawn_table(fake_eval: FakeEval, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(render, "out", lambda *parts: drawn.extend(parts))
    monkeypatch.setattr("kvlocal_cli.commands.eval._on_terminal", lambda: True)
    assert call("eval", "needle").stdout == "" and len(drawn) == 5
    assert call("eval", "needle", "-o", "json").stdout.startswith("{") and len(drawn) == 5


def test_progress_is_drawn_on_a_terminal_only() -> None:
    screen, text = Screen(), io.StringIO()
    screen.console = Console(file=text, force_terminal=True, width=80, color_system=None)
    with screen.progress(case_text) as show:
        show(Step(3, 1200, "niah/[2]"))
    assert "3/1,200 · niah/[2]" in text.getvalue()
    screen.console = Console(file=(quiet := io.StringIO()), force_terminal=False)
    with screen.progress(case_text) as show:
        show(Step(3, 12, "niah/2"))
    assert quiet.getvalue() == ""
    assert case_text(Step(12, 12, "")) == "12/12"
