"""`kvlocal chat` in a real terminal, with the default model and somebody who presses keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
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
        """Everything up to the text, which may be broken up by control sequences that move nothing."""
        between = r"(?:\x1b\[[0-9;?]*[a-zA-Z])*"
        self.child.expect(between.join(map(re.escape, text)))
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
    terminal.wait_for("/help lists the commands")
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
    second.wait_for("goes on: 1 turn, ")
    second.type("And another?")
    second.wait_for(FIGURES)
    second.leave()
    assert second.child.exitstatus == 0
