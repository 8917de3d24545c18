"""`kvlocal chat` in a real terminal, with the default model and somebody who presses keys."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
from processes import COMMAND, environment

SEQUENCES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])")
FIGURES = "tokens held per head"


class Terminal:
    """A child in a terminal of its own; what it wrote is looked at without control sequences."""

    def __init__(self, *arguments: str, state: Path) -> None:
        env = environment({"TERM": "xterm", "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"})
        self.child = pexpect.spawn(
            sys.executable,
            [*COMMAND[1:], *arguments],
            env=env,
            encoding="utf-8",
            timeout=120,
            dimensions=(40, 200),
        )

    def type(self, text: str) -> None:
        """A line, once the line editor listens: it asks for pasted text to be marked, and no longer when it is done."""
        self.child.expect(re.escape("\x1b[?2004h"))
        self.child.send(f"{text}\r")
        self.child.expect(re.escape("\x1b[?2004l"))

    def leave(self) -> None:
        self.child.expect(re.escape("\x1b[?2004h"))
        self.child.sendcontrol("d")
        self.child.expect(pexpect.EOF)
        self.child.close()

    def wait_for(self, text: str) -> str:
        """Everything up to the text, which may be broken up by control sequences that move nothing and be wrapped."""
        between = r"(?:\x1b\[[0-9;?]*[a-zA-Z])*"
        space = r"(?:\x1b\[[0-9;?]*[a-zA-Z]|\s)+"
        self.child.expect(between.join(space if letter == " " else re.escape(letter) for letter in text))
        return SEQUENCES.sub("", str(self.child.before))


@pytest.fixture
def terminal(default_path: Path, tmp_path: Path) -> Iterator[Terminal]:
    options = ["--temp", "0", "-n", "300", "--budget", "96", "-c", "2048", "--session", str(tmp_path / "talk.kvl")]
    out = Terminal("chat", str(default_path), *options, state=tmp_path / "state")
    try:
        yield out
    finally:
        out.child.close(force=True)


def test_the_keys_of_a_conversation(terminal: Terminal, default_path: Path, tmp_path: Path) -> None:
    terminal.wait_for("the commands")
    terminal.type("/set n-predict 8")
    terminal.wait_for("n-predict is 8.")
    terminal.type("Name a river.")
    terminal.wait_for(FIGURES)
    terminal.type("/regen")
    terminal.wait_for(FIGURES)
    terminal.type('"""')
    terminal.type("What is the capital")
    terminal.type('of France?"""')
    terminal.wait_for(FIGURES)
    terminal.type("/undo")
    terminal.wait_for("Taken back: What is the capital of France?")
    terminal.type("/nonsense")
    terminal.wait_for("There is no command /nonsense")
    terminal.type("/load nowhere.kvl")
    terminal.wait_for("There is no session nowhere.kvl")
    terminal.leave()
    assert terminal.child.exitstatus == 0
    assert (tmp_path / "talk.kvl").stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(terminal: Terminal) -> None:
    terminal.type("Tell a very long story about a lighthouse.")
    terminal.child.expect("[A-Za-z]+ [a-z]+ [a-z]+ [a-z]+ ")
    terminal.child.sendcontrol("c")
    terminal.wait_for("interrupted")
    terminal.type("never sent\x03/set n-predict 4")
    terminal.wait_for("n-predict is 4.")
    terminal.type("And then?")
    terminal.wait_for(FIGURES)
    terminal.leave()
    assert terminal.child.exitstatus == 0


def test_a_session_goes_on_where_it_stopped(terminal: Terminal, default_path: Path, tmp_path: Path) -> None:
    terminal.type("/set n-predict 8")
    terminal.type("Name a river.")
    terminal.wait_for(FIGURES)
    terminal.leave()
    arguments = ("chat", str(default_path), "--temp", "0", "-n", "8", "-c", "2048", "--session")
    second = Terminal(*arguments, str(tmp_path / "talk.kvl"), "--budget", "96", state=tmp_path)
    second.wait_for("1 turn, ")
    second.type("And another?")
    second.wait_for(FIGURES)
    second.leave()
    assert second.child.exitstatus == 0


class Window:
    """A chat with the tiny model in a small window, as somebody sees it."""

    def __init__(
        self, model: Path, state: Path, *options: str, n: int = -1, columns: int = 40, term: str = "xterm"
    ) -> None:
        env = environment({"TERM": term, "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"})
        del env["COLUMNS"]
        self.screen = pyte.HistoryScreen(columns, 24, history=1000)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        # more positions than the model was trained for: it goes on until it is stopped
        options = ("--policy", "streaming", "--budget", "64", "-c", "100000", "-n", str(n), *options)
        self.child = pexpect.spawn(
            sys.executable,
            [*COMMAND[1:], "chat", str(model), "-t", "1", "--temp", "0", "--ignore-eos", *options],
            env=env,
            encoding="utf-8",
            timeout=60,
            dimensions=(24, columns),
        )

    def until(self, text: str, n: int = 1) -> None:
        """Show what comes until the text has come n times since the last call."""
        start, end = len(self.raw), time.monotonic() + 60
        while self.raw.count(text, start) < n:
            assert time.monotonic() < end, self.lines()
            try:
                piece = self.child.read_nonblocking(4096, 1)
            except pexpect.TIMEOUT:
                continue
            self.raw += piece
            self.stream.feed(piece)

    def lines(self) -> list[str]:
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def resize(self, columns: int) -> None:
        self.child.setwinsize(24, columns)
        self.screen.resize(24, columns)


@pytest.fixture
def window(tiny_path: Path, tmp_path: Path) -> Iterator[Window]:
    out = Window(tiny_path, tmp_path, "--session", str(tmp_path / "talk.kvl"))
    try:
        yield out
    finally:
        out.child.close(force=True)


READY = "\x1b[?2004h"
LIVE = "\x1b8"
"""Ends the line below an answer."""


def test_an_answer_is_wrapped_and_its_figures_leave_nothing(window: Window) -> None:
    window.until(READY)
    window.child.send("What is the code of the lantern?\r")
    window.until(LIVE, 40)
    assert sum(line.startswith("KV ") for line in window.lines()) == 1
    assert window.screen.display[window.screen.cursor.y + 1].startswith("KV ")
    window.child.send("typed meanwhile")
    window.resize(30)
    window.until(LIVE, 300)  # what was on its way is past
    window.child.sendcontrol("c")
    window.until(READY)
    assert "typed" not in window.raw and "^C" not in window.raw
    lines = [line.rstrip() for line in window.screen.display]
    assert not any("held ·" in line for line in lines)
    (end,) = (i for i, line in enumerate(lines) if line.startswith("KV "))
    assert end > 10 and max(map(len, lines[:end])) < 30
    assert all(len(line) > 14 for line in lines[1 : end - 1] if line), "broken between words, as late as they allow"


def test_a_dumb_terminal_gets_no_figures(tiny_path: Path, tmp_path: Path) -> None:
    window = Window(tiny_path, tmp_path, n=60, term="dumb")
    try:
        window.until("commands")
        window.until(">")
        window.child.send("What is the code of the lantern?\r")
        window.until("decode")
        assert LIVE not in window.raw and "\x1b7" not in window.raw
    finally:
        window.child.close(force=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
def test_a_signal_saves_the_session(when: str, number: int, window: Window, tmp_path: Path) -> None:
    window.until(READY)
    window.child.send("What is the code of the lantern?\r")
    window.until(LIVE, 10)
    if when == "at the prompt":
        window.child.sendcontrol("c")
        window.until(READY)
        assert (tmp_path / "talk.kvl").exists(), "saved after the turn"
    window.child.kill(number)
    window.child.expect(pexpect.EOF)
    window.child.close()
    assert window.child.exitstatus == 128 + number
    assert (tmp_path / "talk.kvl").exists()


def test_a_closed_terminal_saves_the_session(tiny_path: Path, tmp_path: Path) -> None:
    window = Window(tiny_path, tmp_path, "--session", str(tmp_path / "talk.kvl"))
    window.until(READY)
    window.child.send("What is the code of the lantern?\r")
    window.until(LIVE, 10)
    os.close(window.child.child_fd)  # hangs up
    end = time.monotonic() + 60
    while not (tmp_path / "talk.kvl").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    os.waitpid(window.child.pid, 0)
