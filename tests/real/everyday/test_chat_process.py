"""`kvlocal chat` and `kvlocal run` in a pipe, as a script uses them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needles import GATE, LANTERN, MILL, document
from processes import COMMAND, TIMEOUT_S, call, environment

GREEDY = ("--temp", "0", "-t", "1")
DOCUMENT = document(LANTERN, GATE, MILL)
FIRST = f"{DOCUMENT} {LANTERN.question}"
SIZE = r"[\d.]+ [KM]iB"
FIGURES = re.compile(
    rf"KV {SIZE} in use / {SIZE} a full cache would take / {SIZE} peak · [\d,]+ tokens held per head[^·]* · "
    r"prefill [\d,.]+ t/s, decode [\d,.]+ t/s( · .*)?"
)


def lines(*turns: str) -> str:
    return "".join(f"{turn}\n" for turn in turns)


def test_every_line_is_a_turn(tiny_path: Path) -> None:
    """Answers on stdout, one line of figures for each on stderr; blank lines are no turns."""
    result = call("chat", tiny_path, *GREEDY, stdin=lines(FIRST, "", GATE.question, "   ", MILL.question))
    assert result.code == 0
    assert result.stdout == lines(LANTERN.sentence, GATE.sentence, MILL.sentence)
    figures = result.stderr.splitlines()
    assert len(figures) == 3
    assert all(FIGURES.fullmatch(line) for line in figures)
    used = [float(line.split()[1]) for line in figures]
    assert used == sorted(used) and used[0] < used[2], "one cache, which grows"


def test_figures_are_those_of_an_evicted_cache(tiny_path: Path) -> None:
    options = ["--policy", "snapkv", "--policy-arg", "kernel=15", "--budget", "200"]
    result = call("chat", tiny_path, *GREEDY, *options, stdin=lines(f"{document(LANTERN)} {LANTERN.question}"))
    assert result.stdout == lines(LANTERN.sentence)
    match = re.match(r"KV (\S+) (\S+) in use / (\S+) (\S+) .* · (\d+) tokens held per head · ", result.stderr)
    assert match is not None
    used, used_unit, full, full_unit, held = match.groups()
    assert used_unit == full_unit == "KiB"
    assert float(used) == 2 * int(held) < 0.6 * float(full)
    assert 200 < int(held) < 200 + 30, "the budget and the answer"


def test_slash_commands(tiny_path: Path) -> None:
    script = lines("/stats", FIRST, "/kv", "/stats", "/help", "/clear", LANTERN.question, "/exit", "never")
    result = call("chat", tiny_path, *GREEDY, "-n", "24", stdin=script)
    assert result.code == 0
    first, second = result.stdout.splitlines()
    assert first == LANTERN.sentence
    assert LANTERN.value not in second, "cleared"

    said = result.stderr
    assert said.index("There is no answer yet") < said.index("KV ")
    # 4 layers with 2 heads, all of them with everything
    held = re.search(
        r"([\d,]+) tokens read\. Rows: layers; .*\n((?:\d F+ .*\n)+)Mean of a head:   F f16 ([\d,]+)\n", said
    )
    assert held is not None and held[1] == held[3]
    assert [row.split()[0] for row in held[2].splitlines()] == ["0", "1", "2", "3"]
    assert held[2].count(f" {held[1]}") == 8
    for label in ("model", "policy", "budget", "KV in use", "RSS peak", "time to first token", "finish reason"):
        assert re.search(rf"^ {label} {{2,}}\S", said, re.MULTILINE), label
    assert re.search(r"^/exit +leave", said, re.MULTILINE)
    assert "The conversation is cleared." in said
    assert said.count("a full cache would take /") == 2, "two answers: nothing after /exit"


def test_run_in_a_pipe(tiny_path: Path) -> None:
    """The document through the pipe, the question as an option; nothing but the answer on stdout."""
    for stream in ("--stream", "--no-stream"):
        result = call("run", tiny_path, *GREEDY, stream, "-p", MILL.question, stdin=DOCUMENT)
        assert (result.code, result.stdout) == (0, MILL.sentence + "\n")
        assert FIGURES.fullmatch(result.stderr.strip())


def test_the_command_and_the_module_are_the_same(tiny_path: Path) -> None:
    script = Path(sys.executable).with_name("kvlocal")
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    answers = [
        subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment(), check=True).stdout
        for arguments in (["--version"], ["policies"])
        for command in ([str(script)], COMMAND)
    ]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    assert re.fullmatch(r"kvlocal \S+ \(llama\.cpp [0-9a-f]{7,40}, KVL ABI \d+\)\n", answers[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process there")
@pytest.mark.parametrize("command", ["chat", "run"])
def test_ctrl_c_ends_an_answer(command: str, tiny_path: Path) -> None:
    """While it streams: an answer that would take 100,000 tokens. What was said so far stands on stdout."""
    # without the fact the greedy model repeats itself for ever; the context is beyond what it was trained for
    options = ["--policy", "streaming", "--budget", "64", "-n", "-1", "-c", "100000"]
    process = subprocess.Popen(
        [*COMMAND, command, str(tiny_path), *GREEDY, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(lines(f"{document(LANTERN)} {LANTERN.question}").encode())
        if command == "run":
            process.stdin.close()  # a prompt ends with its pipe; a chat's next line may still come
            process.stdin = None
        begun = b""
        while len(begun) < 40 and (piece := os.read(process.stdout.fileno(), 40)):
            begun += piece
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    text, said = (begun + rest).decode(), error.decode()
    assert process.returncode == 130
    assert text.startswith("The code of the lantern is ") and text.endswith("\n")
    # after the note on a context that is longer than the model was trained for
    last = said.strip().splitlines()[-1]
    assert FIGURES.fullmatch(last) and last.endswith("· interrupted")


def test_a_line_that_begins_with_a_path_is_a_question(tiny_path: Path) -> None:
    result = call("chat", tiny_path, *GREEDY, "-n", "4", stdin=lines("/etc/hosts what is it?", "// and this?"))
    assert result.code == 0 and len(result.stderr.splitlines()) == 2 and result.stdout.strip()
    result = call("chat", tiny_path, *GREEDY, stdin=lines("/home is where it is", "never asked"))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: There is no command /home; the commands are /kv, ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_session_survives_signals(number: int, tiny_path: Path, tmp_path: Path) -> None:
    """After one turn, and in the middle of the second one, whose half is kept too."""
    session = tmp_path / "talk.kvl"
    options = ["--policy", "streaming", "--budget", "64", "-n", "-1", "-c", "100000", "--session", str(session)]
    process = subprocess.Popen(
        [*COMMAND, "chat", str(tiny_path), *GREEDY, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(lines(f"{document(LANTERN)} {LANTERN.question}").encode())
        begun = b""
        while len(begun) < 40 and (piece := os.read(process.stdout.fileno(), 40)):
            begun += piece
        # twice, and together with the end of the input: neither is to interrupt the save
        process.send_signal(number)
        process.stdin.close()
        process.stdin = None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number and b"Traceback" not in error and b"ignored" not in error
    again = call("chat", tiny_path, *GREEDY, *options, stdin="")
    assert again.code == 0 and f"{session} goes on: 1 turn, " in again.stderr


@pytest.mark.parametrize(("closed", "code"), [(">&-", 1), ("2>&-", 0), (">&- 2>&-", 1), ("<&-", 0), ("| head -c 1", 0)])
def test_closed_streams_are_no_tracebacks(closed: str, code: int, tiny_path: Path) -> None:
    command = f'"{COMMAND[0]}" -m kvlocal run "$MODEL" -t 1 --temp 0 -n 8 -p Hello {closed}'
    env = environment({"MODEL": str(tiny_path)})
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env, timeout=TIMEOUT_S, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    if closed == ">&-":
        assert done.stderr.startswith("Error: Standard output is closed")


def test_ctrl_c_while_modules_are_loaded_is_quiet(tiny_path: Path) -> None:
    """Whenever it comes, from the first line of ours on."""
    code = "import os, kvlocal_cli.start as start; os.write(1, b'.'); start.main()"
    arguments = ["run", str(tiny_path), "-p", "Tell a story.", "-n", "-1", "--ignore-eos"]
    for delay in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        )
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT_S)
        assert b"Traceback" not in error and b"ignored" not in error
        assert process.returncode == 130


def test_a_prompt_cache_that_cannot_be_written_is_a_warning(tiny_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "none" / "cache.kvl"
    result = call("run", tiny_path, *GREEDY, "--prompt-cache", cache, "-p", MILL.question, stdin=DOCUMENT)
    assert (result.code, result.stdout) == (0, MILL.sentence + "\n")
    assert "Warning: the prompt cache was not kept. The session cannot be written to" in result.stderr


def test_a_conversation_is_no_prompt_cache_and_the_reverse(tiny_path: Path, tmp_path: Path) -> None:
    talk, cache = tmp_path / "talk.kvl", tmp_path / "cache.kvl"
    assert call("chat", tiny_path, *GREEDY, "--session", talk, stdin=lines("Hello")).code == 0
    assert call("run", tiny_path, *GREEDY, "--prompt-cache", cache, "-p", "Hello").code == 0
    before = talk.read_bytes(), cache.read_bytes()
    result = call("run", tiny_path, *GREEDY, "--prompt-cache", talk, "-p", "Hello")
    assert result.code == 2 and f"{talk} holds a conversation" in result.stderr
    result = call("chat", tiny_path, *GREEDY, "--session", cache, stdin=lines("Hello"))
    assert result.code == 2 and f"{cache} holds the cache of a prompt" in result.stderr
    result = call("chat", tiny_path, *GREEDY, stdin=lines(f"/load {cache}"))
    assert result.code == 2 and "the cache of a prompt" in result.stderr
    assert (talk.read_bytes(), cache.read_bytes()) == before


def test_kv_map_draws_what_the_budget_left(tiny_path: Path, tmp_path: Path) -> None:
    result = call("kv-map", tiny_path, "-t", "1", "--budget", "100", "-p", MILL.question, stdin=DOCUMENT)
    assert result.code == 0 and "· gone " in result.stdout and "Mean of a head:" in result.stdout
    picture = tmp_path / "heads.svg"
    assert call("kv-map", tiny_path, "-t", "1", "-p", "Hello", picture).code == 0
    assert picture.read_text("utf-8").count("<title>") == 8
