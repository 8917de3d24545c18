"""Whole calls of the command on the tiny model, to the letter: what goes to each stream, with nothing made up.

Times and what belongs to this machine are replaced by ``#``; all else is the same everywhere.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from fake_engine import call
from needles import LANTERN, document

ANSWER = "The code of the lantern is 48213."
GREEDY = ["--temp", "0", "-t", "1", "-n", "40"]
WIDE = ["--policy", "snapkv", "--policy-arg", "kernel=31", "--budget", "96"]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_path: Path) -> None:
    """The working directory: the model and two documents; a screen 80 wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copy(tiny_path, "tiny.gguf")
    Path("late.txt").write_text(document(LANTERN, before=6, after=1), "utf-8")
    Path("early.txt").write_text(document(LANTERN, before=1, after=6), "utf-8")


def masked(text: str, *patterns: str) -> str:
    for pattern in (r"[\d,.]+(?= t/s)", *patterns):
        text = re.sub(pattern, "#", text)
    return text


def test_run_answers_on_one_stream_and_measures_on_the_other() -> None:
    result = call("run", "tiny.gguf", "-f", "early.txt", "-p", LANTERN.question, *WIDE, *GREEDY)
    assert (result.exit_code, result.stdout) == (0, ANSWER + "\n")
    assert masked(result.stderr) == (
        "KV 224.0 KiB in use / 628.0 KiB a full cache would take / 640.0 KiB peak"
        " · 112 tokens held per head · prefill # t/s, decode # t/s\n"
    )


def test_run_as_json() -> None:
    result = call("run", "tiny.gguf", "-f", "early.txt", "-p", LANTERN.question, *WIDE, *GREEDY, "--json")
    assert (result.exit_code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    values = json.loads(result.stdout)
    rss, timing = values.pop("rss"), values.pop("timing")
    assert rss["before_evict_bytes"] > 0 and min(timing.values()) > 0
    assert values == {
        "text": ANSWER,
        "model": "kvlocal-tiny",
        "policy": "snapkv",
        "policy_args": {"window": 32, "sink": 0, "kernel": 31, "pool": "max", "agg": "mean", "compat": None},
        "budget": {"tokens": 96, "fraction": 96 / 314, "bytes": 96 * 2048},
        "tokens": {"prompt": 298, "generated": 16, "held_mean": 112, "held_min": 112, "held_max": 112},
        "kv": {
            "full_bytes": 314 * 2048,
            "used_bytes": 112 * 2048,
            "allocated_bytes": 128 * 2048,
            "peak_bytes": 320 * 2048,
            "fixed_bytes": 0,
        },
        "reads": None,
        "archive": None,
        "finish_reason": "stop",
    }


def test_a_chat_from_a_pipe() -> None:
    turns = [ANSWER, LANTERN.question, "/undo", "/kv", "/nonsense"]
    result = call("chat", "tiny.gguf", "--policy", "streaming", "--budget", "128", *GREEDY, stdin="\n".join(turns))
    assert (result.exit_code, result.stdout) == (2, f"{ANSWER}\n{ANSWER}\n"), "the last line is no command"
    bar = "F" * 24 + " 41"
    assert masked(result.stderr) == "\n".join(
        [
            "KV 82.0 KiB in use / 82.0 KiB a full cache would take / 128.0 KiB peak"
            " · 41 tokens held per head · prefill # t/s, decode # t/s",
            "KV 156.0 KiB in use / 156.0 KiB a full cache would take / 192.0 KiB peak"
            " · 78 tokens held per head · prefill # t/s, decode # t/s",
            f"Taken back: {LANTERN.question}",
            "41 tokens read. Rows: layers; columns: KV heads, and tokens held.",
            *(f"{layer} {bar}  {bar}" for layer in range(4)),
            "Mean of a head:   F f16 41",
            "/kv LAYER lists the heads of a layer, /kv FILE.svg writes the picture.",
            "Error: There is no command /nonsense; the commands are /kv, /stats, /regen, /undo, /read, /system, /set, "
            '/policy, /budget, /save, /load, /clear, /help, /exit. A question that begins like one goes between """ '
            'and """.',
            "",
        ]
    )


def test_batch_answers_a_line_per_document() -> None:
    documents = ["early.txt", "late.txt", "-o", "out.jsonl", "--question", LANTERN.question, "--task", "qa"]
    result = call("batch", "tiny.gguf", *documents, *GREEDY, "--policy", "full", "--parallel", "2")
    assert (result.exit_code, result.stdout) == (0, "")
    assert masked(result.stderr, r"[\d,.]+(?= documents/h)", r"[\d.]+ MiB") == (
        "2 documents · # documents/h · # t/s · 613 tokens read, 32 written · KV peak # · out.jsonl\n"
    )
    lines = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    for line, name in zip(lines, ("early.txt", "late.txt"), strict=True):
        assert line.pop("timing").keys() == {"evict_s", "prefill_s", "decode_s", "total_s"}
        assert (line["settings"]["policy"], line.pop("settings")["budget"]) == ("full", "2048")
        n = line["tokens"]["prompt"] + 16
        assert line == {
            "id": name,
            "source": name,
            "text": ANSWER,
            "finish_reason": "stop",
            "tokens": {"prompt": n - 16, "generated": 16},
            "kv": {
                "prefill": "exact",
                "held_mean": n,
                "used_bytes": 2048 * n,
                "full_bytes": 2048 * n,
                "archive_bytes": 0,
            },
            "error": None,
        }


def test_plan_says_what_a_run_takes() -> None:
    result = call("plan", "tiny.gguf", "--policy", "streaming", "--budget", "512", "-c", "2048")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.rstrip() for line in masked(result.stdout, r"[\d.]+ [GK]iB").splitlines()]
    assert lines[:2] == [
        "kvlocal-tiny · streaming 512 · kv f16 · exact prefill",
        "a context of 2,048: a prompt of 1,535 tokens, 512 generated",
    ]
    assert " thread" in lines.pop(2), "how many this machine gives"
    assert lines.pop(2).startswith("pages of 4 layers on CPU: "), "tested there, or not"
    assert lines[2] == ""
    assert " KV peak             3.0 MiB   1.0 MiB in use at the end; full f16: 4.0 MiB" in lines
    assert [line.split("  ")[0].strip() for line in lines[3:10] if line] == [
        "weights",
        "KV peak",
        "page tables",
        "compute buffers",
        "total",
        "free",
    ]
    assert lines[10:] == [
        "",
        "It fits.",
        "Largest context, exact prefill: f16 4,096, q8 4,096, q4 4,096, kv3 4,096, kv2",
        "4,096, kivi 4,096, logquant 4,096.",
    ]


def test_bench_measures_two_policies_at_a_depth() -> None:
    compared = ["-d", "256", "--policy", "full,streaming", "--budget", "64", "-p", "32", "-n", "8", "-r", "1"]
    result = call("bench", "tiny.gguf", *compared, "-t", "1")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:]]
    at = {name: i for i, name in enumerate(rows[0])}
    exact = ["depth", "policy", "budget", "used", "peak"]
    assert [[row[at[name]] for name in exact] for row in rows[2:]] == [
        ["256", "full", "100%", "512.0 KiB", "512.0 KiB"],
        ["256", "streaming", "64", "128.0 KiB", "512.0 KiB"],
    ]
    assert all(float(row[at["decode t/s"]].split()[0].replace(",", "")) > 0 for row in rows[2:])
