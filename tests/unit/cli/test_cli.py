"""What all commands have in common, `kvlocal policies` and `kvlocal demo`; the engine is a fake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import ANSWER, Fake, call, fail, install, sentence

from kvlocal.errors import KVError
from kvlocal.storage.storage import STORAGES


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


RUN_FLAGS = (
    "-hf --hf -p --prompt -f --file -c --ctx-size -n --n-predict -b --batch-size -ub --ubatch-size -t --threads -ngl"
    " --n-gpu-layers --kernels --temp --top-k --top-p --min-p --repeat-penalty -s --seed -sys --system-prompt --policy"
    " --policy-arg --budget --kv-sink --kv-window --prefill --chunk --guide"
    " --evict-every --ignore-eos --no-chat-template --stream --no-stream --json"
)
NOT_IN_CHAT = {"-p", "--prompt", "-f", "--file", "--no-chat-template", "--stream", "--no-stream", "--json"}


def test_help_names_every_flag() -> None:
    flags = set(RUN_FLAGS.split())
    run, chat = (set(call(name, "--help").stdout.replace(",", " ").split()) for name in ("run", "chat"))
    assert flags <= run
    assert flags - NOT_IN_CHAT <= chat
    assert {"--document", "--question-file"} <= set(call("demo", "-h").stdout.split())


def test_help_groups_the_options_and_shows_an_example() -> None:
    text = call("run", "-h").stdout
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Prompt:", "Model:", "KV cache:", "Sampling:", "Output:", "Options:"]
    assert '\n  kvlocal run -f report.txt -p "Who signed it?" --budget 25%\n' in text
    words = " ".join(text.split())
    assert "[default: ladder]" in words and "[default: 2048]" in words


def test_one_storage_is_chosen_of_those_there_are() -> None:
    text = call("run", "-h").stdout
    assert all(storage in text for storage in STORAGES)
    assert "There is no storage 'q5'" in call("run", "--kv", "q5", "-p", "hi").stderr


@pytest.mark.parametrize(
    "command",
    ["run", "chat", "batch", "plan", "bench", "eval", "policies", "pull", "models", "doctor", "demo"],
)
def test_the_overview_has_every_command_in_full(command: str) -> None:
    line = next(line for line in call("--help").stdout.splitlines() if line.startswith(f"  {command} "))
    assert line.endswith(".") and not line.endswith("...")


def test_without_arguments_the_help_is_shown() -> None:
    result = call()
    assert result.exit_code == 2 and result.stderr.startswith("Usage: kvlocal ")


def test_version(fake: Fake) -> None:
    assert call("--version").stdout == "kvlocal 1.2.3 (llama.cpp 0c1e57098, KVL ABI 7)\n"


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlocal_cli.backend.engine.versions", fail(KVError("the native library is missing")))
    assert sentence("--version", code=1) == "the native library is missing."


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, kvlocal_cli.main; print(*({'rich', 'numpy', 'prompt_toolkit'} & sys.modules.keys()))"
    path = os.pathsep.join(filter(None, sys.path))
    loaded = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


def cells(text: str) -> list[str]:
    """The lines of a table without its layout: one space between words, one dash for a rule."""
    return [re.sub("─+", "─", " ".join(line.split())) for line in text.splitlines() if line.strip()]


def test_policies_lists_defaults_papers_and_each_parameter_once(fake: Fake) -> None:
    result = call("policies")
    assert (result.exit_code, result.stderr) == (0, "")
    assert cells(result.stdout) == [
        "policy what it does parameters",
        "─",
        "full Keeps every token.",
        "snapkv Keeps what is read. window=32 compat=none",
        "arXiv:1",
        "ada Heads compete. window=32",
        "arXiv:2",
        "parameter meaning values",
        "─",
        "window most recent tokens a whole number",
        "compat follow to the letter one of none, adakv",
    ]


def test_demo_asks_twice_and_compares(fake: Fake, tmp_path: Path) -> None:
    document, question = tmp_path / "log.txt", tmp_path / "question.txt"
    document.write_text("Day 1: rain.\n")
    question.write_text("When did it rain?\n")
    result = call("demo", "--document", str(document), "--question-file", str(question), "-t", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert cells(result.stdout) == [
        "Question: When did it rain?",
        "--policy full --budget 100%",
        ANSWER,
        "--policy ladder --budget 25%",
        ANSWER,
        "policy full ladder",
        "─",
        "budget, tokens per head 256 (25%) 256 (25%)",
        "tokens held, mean 256 256",
        "KV in use 6.0 MiB 6.0 MiB",
        "KV peak 25.0 MiB 25.0 MiB",
        "a full cache would take 24.0 MiB 24.0 MiB",
        "RSS before eviction no eviction 300.0 MiB",
        "RSS after eviction no eviction 281.0 MiB",
        "prefill 512 t/s 512 t/s",
        "decode 31.2 t/s 31.2 t/s",
    ]
    full, ladder = fake.engines
    assert (full.settings.policy, full.settings.budget) == ("full", "100%")
    assert (ladder.settings.policy, ladder.settings.budget) == ("ladder", "25%")
    assert full.settings.n_threads == 2 and full.n_predict == 48 and full.sampling.temp == 0
    assert full.messages == ladder.messages == [{"role": "user", "content": "Day 1: rain.\n\nWhen did it rain?"}]


def test_demo_needs_both_files(fake: Fake, tmp_path: Path) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text("x")
    empty.write_text("")
    assert sentence("demo", "--document", str(text)).startswith("Missing option '--question-file'")
    assert sentence("demo", "--document", str(text), "--question-file", str(empty)) == f"'{empty}' is empty."
    assert "there is no file" in sentence("demo", "--document", str(tmp_path / "no"), "--question-file", str(text))


def test_unknown_commands_are_usage_errors(fake: Fake) -> None:
    assert sentence("sing") == "No such command 'sing'; see `kvlocal --help`."
