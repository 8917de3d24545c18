"""`kvlocal batch` without a model: what is written, what is said, and with which exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import call, install, press_ctrl_c, sentence
from kvlocal_cli.backend import batch as backend_batch

from kvlocal.batch.batch import Result, Step
from kvlocal.batch.documents import Document

MIB = 2**20
USAGE = ["-o", "out.jsonl", "--task", "summarize"]


@dataclass
class FakeBatch:
    """Answers with the text in capitals; fails where it says so."""

    arguments: dict[str, Any]
    fault: Callable[[Document], None]
    ran: list[Document] = field(default_factory=list)

    def run(self, documents: Sequence[Document], on_step: Callable[[Step], None]) -> Iterator[Result]:
        for document in documents:
            self.ran.append(document)
            self.fault(document)
            result = Result(document.id, document.source, error=document.fault)
            if not document.fault:
                result.text, result.finish_reason = document.text.upper(), "stop"
                result.tokens, result.kv = {"prompt": 9, "generated": 2}, {"used_bytes": MIB}
            n = len(self.ran)
            on_step(Step(n, sum(d.fault is not None for d in self.ran), 1, 9 * n, 2 * n, MIB, 2 * MIB))
            yield result


@dataclass
class World:
    batches: list[FakeBatch] = field(default_factory=list)
    fault: Callable[[Document], None] = lambda _document: None

    @property
    def batch(self) -> FakeBatch:
        return self.batches[-1]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = World()

    @contextmanager
    def open_batch(settings: Any, documents: Any, system: Any, *rest: Any) -> Iterator[FakeBatch]:
        names = ("instruction", "raw", "n_predict", "sampling", "parallel", "prompt_cache", "screen")
        arguments = {"settings": settings, "system": system, **dict(zip(names, rest, strict=True))}
        found.batches.append(FakeBatch(arguments, found.fault))
        yield found.batch

    monkeypatch.setattr(backend_batch, "open_batch", open_batch)
    monkeypatch.setattr("time.perf_counter", iter(range(10**9)).__next__)
    for name in ("a", "b", "c"):
        Path(f"{name}.txt").write_text(f"text {name}")
    return found


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]


def test_a_line_per_document_and_a_last_line_of_figures(world: World) -> None:
    result = call("batch", "model.gguf", "a.txt", "[bc].txt", *USAGE, "--parallel", "4", "--budget", "25%", "-n", "7")
    assert (result.exit_code, result.stdout) == (0, "")
    first = lines()[0]
    made_with = first.pop("settings")
    assert (made_with["instruction"], made_with["n_predict"]) == ("Summarize the following text in a few sentences.", 7)
    assert first == {
        "id": "a.txt",
        "source": "a.txt",
        "text": "TEXT A",
        "finish_reason": "stop",
        "tokens": {"prompt": 9, "generated": 2},
        "kv": {"used_bytes": MIB},
        "timing": {},
        "error": None,
    }
    assert [row["id"] for row in lines()] == ["a.txt", "b.txt", "c.txt"]
    start, *rest = result.stderr.strip().split(" · ")
    assert start == "3 documents" and rest[2:] == ["27 tokens read, 6 written", "KV peak 2.0 MiB", "out.jsonl"]
    given = SimpleNamespace(**world.batch.arguments)
    assert (given.settings.model, given.settings.budget, given.parallel, given.n_predict) == ("model.gguf", "25%", 4, 7)
    assert given.instruction == "Summarize the following text in a few sentences." and not given.raw


def test_without_a_model_all_are_inputs(world: World) -> None:
    assert call("batch", "a.txt", *USAGE).exit_code == 0
    assert world.batch.arguments["settings"].model is None and len(lines()) == 1
    assert call("batch", "hf:some/repo", "a.txt", "-o", "2.jsonl", "--instruction", "Do.").exit_code == 0
    assert world.batch.arguments["settings"].model == "hf:some/repo"


def test_a_failed_document_is_a_line_and_the_code_is_3(world: World) -> None:
    Path("bad.txt").write_bytes(b"\xff")
    result = call("batch", "bad.txt", "a.txt", *USAGE)
    assert result.exit_code == 3
    assert [(row["id"], row["error"]) for row in lines()] == [
        ("bad.txt", "'bad.txt' is not UTF-8 (byte 0)."),
        ("a.txt", None),
    ]
    assert result.stderr.startswith("2 documents (1 failed) · ")


def test_fail_fast_stops_there(world: World) -> None:
    Path("bad.txt").write_bytes(b"\xff")
    assert call("batch", "bad.txt", "a.txt", *USAGE, "--fail-fast").exit_code == 3
    assert [row["id"] for row in lines()] == ["bad.txt"]


def test_resume_does_what_is_missing_and_tries_again_what_failed(world: World) -> None:
    Path("b.txt").write_bytes(b"\xff")
    assert call("batch", "a.txt", "b.txt", *USAGE).exit_code == 3
    assert "go on with --resume" in sentence("batch", "a.txt", *USAGE)
    Path("b.txt").write_text("mended")
    result = call("batch", "a.txt", "b.txt", "c.txt", *USAGE, "--resume")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "1 of 3 documents are in out.jsonl already."
    assert [d.id for d in world.batch.ran] == ["b.txt", "c.txt"]
    assert [(row["id"], row["text"]) for row in lines()] == [
        ("a.txt", "TEXT A"),
        ("b.txt", "MENDED"),
        ("c.txt", "TEXT C"),
    ]
    again = call("batch", "a.txt", "b.txt", "c.txt", *USAGE, "--resume")
    assert (again.exit_code, again.stderr) == (0, "3 of 3 documents are in out.jsonl already.\n")
    assert len(world.batches) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--instruction", "Translate."], "another instruction"),
        (["--task", "extract"], "another instruction"),
        (["--task", "summarize", "--question", "Why?"], "another question"),
        (["--task", "summarize", "-sys", "Be brief."], "another system prompt"),
        (["--task", "summarize", "--policy", "snapkv"], "another policy"),
        (["--task", "summarize", "--policy-arg", "sink=8"], "another set of policy parameters"),
        (["--task", "summarize", "--budget", "99"], "another budget"),
        (["--task", "summarize", "--temp", "0"], "another sampling"),
        (["--task", "summarize", "--seed", "3"], "another sampling"),
        (["--task", "summarize", "-c", "512"], "another context (-c): 0, now 512"),
        (["--task", "summarize", "-n", "9"], "another length of the answers (-n)"),
        (["--task", "summarize", "--no-chat-template"], "another use of the chat template"),
        (["--task", "summarize", "--prefill", "chunked"], "another prefill"),
        (["-hf", "some/repo", "--task", "summarize"], "another model"),
        (["--task", "summarize", "--policy", "ada-snapkv", "--kv", "q8"], "another policy"),
    ],
)
def test_resume_refuses_a_file_of_other_settings(change: list[str], said: str, world: World) -> None:
    Path("b.txt").write_bytes(b"\xff")
    assert call("batch", "a.txt", "b.txt", *USAGE).exit_code == 3
    before = Path("out.jsonl").read_bytes()
    text = sentence("batch", "a.txt", "b.txt", "c.txt", "-o", "out.jsonl", "--resume", *change)
    assert said in text and "out.jsonl, line 1 was made with" in text
    assert Path("out.jsonl").read_bytes() == before and len(world.batches) == 1


def test_resume_allows_other_settings_of_speed_alone(world: World) -> None:
    assert call("batch", "a.txt", *USAGE).exit_code == 0
    speed = ["-t", "1", "-b", "64", "--parallel", "3", "--prompt-cache", "x.kvl", "--fail-fast"]
    assert call("batch", "a.txt", "b.txt", *USAGE, "--resume", *speed).exit_code == 0


def test_a_model_is_the_same_wherever_it_lies(world: World) -> None:
    Path("m.gguf").write_bytes(b"GGUF" + bytes(100))
    Path("x").mkdir()
    Path("x/m.gguf").write_bytes(Path("m.gguf").read_bytes())
    assert call("batch", "m.gguf", "a.txt", *USAGE).exit_code == 0
    assert call("batch", "x/m.gguf", "a.txt", "b.txt", *USAGE, "--resume").exit_code == 0
    Path("m.gguf").write_bytes(b"GGUF" + bytes(99) + b"1")
    assert "another model" in sentence("batch", "m.gguf", "a.txt", "b.txt", *USAGE, "--resume")


def test_a_policy_of_a_variable_is_not_looked_for_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("evil_policy.py").write_text("open('ran', 'w').close()")
    monkeypatch.setenv("KVLOCAL_POLICY", "evil_policy:Mine")
    sentence("batch", "a.txt", *USAGE)
    assert not Path("ran").exists() and not Path("out.jsonl").exists()


def test_a_minus_prints_the_lines(world: World) -> None:
    result = call("batch", "a.txt", "b.txt", "-o", "-", "--task", "summarize")
    assert result.exit_code == 0 and [json.loads(line)["text"] for line in result.stdout.splitlines()] == [
        "TEXT A",
        "TEXT B",
    ]
    assert result.stderr.strip().endswith("standard output") and not Path("-").exists()
    assert "cannot be gone on with" in sentence("batch", "a.txt", "-o", "-", "--task", "summarize", "--resume")


def test_ctrl_c_keeps_the_lines_that_are_there(world: World) -> None:
    def fault(document: Document) -> None:
        if document.id == "b.txt":
            press_ctrl_c()

    world.fault = fault
    result = call("batch", "a.txt", "b.txt", "c.txt", *USAGE)
    assert result.exit_code == 130 and [row["id"] for row in lines()] == ["a.txt"]


def test_questions_come_from_the_lines_or_from_the_command(world: World) -> None:
    rows = [{"id": "1", "article": "A", "ask": "Why?"}, {"id": "2", "article": "B"}]
    Path("d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fields = ["--field", "article", "--question-field", "ask"]
    assert call("batch", "d.jsonl", *fields, "-o", "1.jsonl", "--task", "qa", "--question", "Who?").exit_code == 0
    assert [d.question for d in world.batch.ran] == ["Why?", "Who?"]
    assert call("batch", "d.jsonl", *fields, "-o", "2.jsonl", "--task", "qa").exit_code == 3
    assert [d.fault for d in world.batch.ran] == [
        None,
        "d.jsonl:2: There is no question: give the line a field 'question', or --question TEXT.",
    ]
    assert call("batch", "d.jsonl", *fields, "-o", "3.jsonl", "--question", "Who?").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.txt", "--task", "summarize"], "Missing option '-o' / '--output'"),
        (["a.txt", "-o", "o"], "Say what to do with the documents"),
        (["a.txt", "-o", "o", "--task", "qa", "--instruction", "x"], "--task and --instruction both say what to do"),
        (["none.txt", *USAGE], "There is no file 'none.txt'"),
        (["model.gguf", *USAGE], "There are no documents in no inputs"),
        (["a.txt", *USAGE, "-sys", "x", "--no-chat-template"], "-sys needs the chat template"),
        (["a.txt", *USAGE, "--parallel", "0"], "Invalid value for '--parallel'"),
        (["a.txt", *USAGE, "-hf", "x/y", "m.gguf"], "There is no file 'm.gguf'"),
        (["m.gguf", "a.txt", *USAGE, "-hf", "x/y"], "two models are named"),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], reason: str, world: World) -> None:
    assert reason in sentence("batch", *arguments)
    assert not world.batches


def test_an_output_that_cannot_be_written(world: World) -> None:
    assert "none/out.jsonl cannot be written" in sentence(
        "batch", "a.txt", "-o", "none/out.jsonl", "--task", "qa", code=1
    )
