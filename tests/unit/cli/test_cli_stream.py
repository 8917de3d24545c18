"""Answers on a terminal: lines between words, no control characters, figures below; signals that wait their turn."""

from __future__ import annotations

import os
import pty
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from fake_engine import Fake, call, fail, install
from kvlocal_cli.render.controls import plain, plain_json
from kvlocal_cli.render.report import live_figures
from kvlocal_cli.terminal import status_line
from kvlocal_cli.terminal import stream as stream_module
from kvlocal_cli.terminal.echo import NoEcho
from kvlocal_cli.terminal.interrupt import Ended, Interrupt
from kvlocal_cli.terminal.status_line import StatusLine
from kvlocal_cli.terminal.stream import Answer
from kvlocal_cli.terminal.wrap import Wrapper

OSC_52 = "\x1b]52;c;aGVsbG8=\x07"


def wrapped(text: str, width: int, piece: int = 1) -> str:
    wrapper = Wrapper(lambda: width)
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    return "".join(map(wrapper.feed, pieces)) + wrapper.end()


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("The quick brown fox jumps", 10, "The quick\nbrown fox\njumps"),
        ("exact fits", 10, "exact fits"),
        ("  indented code\n\ttab\n", 12, "  indented\ncode\n\ttab\n"),
        ("漢字漢字漢字。漢字", 6, "漢字漢\n字漢\n字。漢\n字"),
        ("a漢b漢c", 4, "a漢b\n漢c"),
        ("abcdefghijklmnop and more", 10, "abcdefghij\nklmnop and\nmore"),
        ("a xxxxxxxxxxxxx b", 10, "a\nxxxxxxxxxx\nxxx b"),
        ("👍🏽👍🏽👍🏽 🇩🇪🇫🇷", 4, "👍🏽👍🏽\n👍🏽\n🇩🇪🇫🇷"),
        ("one  two   \n\nthree", 20, "one  two   \n\nthree"),
        ("", 10, ""),
    ],
)
def test_lines_end_between_words_and_count_cells(text: str, width: int, expected: str, piece: int) -> None:
    assert wrapped(text, width, piece) == expected


def test_the_width_is_asked_for_again() -> None:
    widths = [20]
    wrapper = Wrapper(lambda: widths[0])
    written = wrapper.feed("one two three four ")
    widths[0] = 9
    assert written + wrapper.feed("five six seven ") + wrapper.end() == "one two three four\nfive six\nseven "


def test_control_characters_are_dropped_wherever_a_piece_ends() -> None:
    assert plain(f"a{OSC_52}b\tc\nd\r\x7f\x9d52;c;x\x9c") == "a]52;c;aGVsbG8=b\tc\nd52;c;x"
    assert plain("\x1b") + plain("]52;c;aGVsbG8=\x07") == "]52;c;aGVsbG8="
    assert plain_json('{"a": "\x9b31m"}') == '{"a": "\\u009b31m"}'


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Standard output is a window of 20 columns and 6 lines; what it shows."""
    screen = pyte.HistoryScreen(20, 6)
    text = pyte.Stream(screen)

    class Output:
        def write(self, piece: str) -> None:
            text.feed(piece.replace("\n", "\r\n"))

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for module in (stream_module, status_line):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=Output()))
    monkeypatch.setattr(stream_module, "window_width", lambda: screen.columns)
    yield screen


def lines(screen: Any) -> list[str]:
    above = ["".join(row[x].data for x in range(screen.columns)) for row in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


def test_figures_stand_below_the_answer_and_leave_nothing(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlocal_cli.terminal.status_line._PERIOD_S", 0)
    seen = []
    answer = Answer(figures=lambda width: f"KV {len(seen)} · 9 t/s and much more"[:width])
    words = [f"word{i} " for i in range(24)]
    for word in words:
        answer.write(word)
        shown = [line for line in lines(window) if line.startswith("KV")]
        seen.append(shown)
        below = window.display[window.cursor.y + 1 : window.cursor.y + 2]
        assert len(shown) == 1 and below[0].startswith("KV "), "one line, below the last one of the answer"
    answer.end()
    said = [line for line in lines(window) if line]
    assert not any("KV" in line for line in said)
    assert " ".join(said) == "".join(words).strip() and max(map(len, said)) < 20


def test_figures_are_asked_for_five_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kvlocal_cli.terminal.status_line.time.perf_counter", lambda: now[0])
    asked = []
    line = StatusLine(lambda width: asked.append(width) or "KV", lambda: 40)  # type: ignore[func-returns-value]
    for _ in range(1000):
        now[0] += 0.01
        line.around("x")
    assert len(asked) <= 51


def test_a_dumb_terminal_gets_wrapped_text_only(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    answer = Answer(figures=lambda width: "KV")
    answer.write(f"one two{OSC_52[:4]}")
    answer.write(f"{OSC_52[4:]} three four five six seven")
    answer.end()
    assert [line for line in lines(window) if line] == ["one", "two]52;c;aGVsbG8=", "three four five six", "seven"]


@pytest.mark.parametrize("width", [100, 60, 40, 10])
def test_live_figures_fit_the_window(width: int) -> None:
    kv = {"used_bytes": 2**21, "full_bytes": 2**24, "held_mean": 1024.0, "archive_bytes": 0}
    text = live_figures(kv, 2**22, 31.25, width)
    on_disk = live_figures(kv | {"archive_bytes": 3 * 2**20}, 2**22, 31.25, width)
    assert len(on_disk) <= width and ("3.0 MiB on disk" in on_disk) == (width >= 100)
    assert len(text) <= width and text.startswith("KV 2.0 MiB")
    if width >= 60:
        assert all(each in text for each in ("16.0 MiB", "4.0 MiB", "1,024", "31.2 t/s"))


def test_in_a_pipe_every_byte_is_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch)
    fake.options = {"words": (f"{OSC_52[:3]}", f"{OSC_52[3:]} ", "long " * 40)}
    assert call("run", "-p", "x").stdout == f"{OSC_52} {'long ' * 40}\n"


def test_without_stats_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert call("run", "-p", "x", "--no-stats").stderr == ""
    assert call("chat", "--no-stats", stdin="Hello\n").stderr == ""


def test_the_text_of_an_error_cannot_act_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlocal.errors import KVError

    fake: Fake = install(monkeypatch)
    fake.options = {"prefill_fault": fail(KVError(f"the template says: {OSC_52}\x9b31m"))}
    assert call("run", "-p", "x").stderr == "Error: the template says: ]52;c;aGVsbG8=31m.\n"


# --- keys ---------------------------------------------------------------------------------------------------------


def test_keys_do_not_show_while_an_answer_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as file:
        monkeypatch.setattr(sys, "stdin", file)
        monkeypatch.setattr(os, "tcgetpgrp", lambda _fd: os.getpgrp())
        before = termios.tcgetattr(theirs)
        with pytest.raises(KeyboardInterrupt), NoEcho(discard=True):
            assert not termios.tcgetattr(theirs)[3] & termios.ECHO
            assert termios.tcgetattr(theirs)[3] & termios.ISIG, "Ctrl-C still works"
            os.write(ours, b"typed meanwhile\n")
            raise KeyboardInterrupt
        assert termios.tcgetattr(theirs) == before
        os.set_blocking(theirs, False)
        with pytest.raises(BlockingIOError):
            os.read(theirs, 100)
        monkeypatch.setattr(os, "tcgetpgrp", lambda _fd: os.getpgrp() + 1)
        with NoEcho(discard=True):
            assert termios.tcgetattr(theirs) == before, "a job in the background leaves the terminal alone"
    os.close(ours)


# --- signals ------------------------------------------------------------------------------------------------------


def test_signals_are_noted_and_obeyed_where_nothing_is_lost() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt(raise_from=0) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested and interrupt.ending and interrupt.exit_code == 128 + signal.SIGTERM
        interrupt.clear()
        with pytest.raises(Ended) as ended, interrupt.raising_from(1):
            pytest.fail("what came before is obeyed first")
        assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_nothing_happens_a_signal_need_not_wait() -> None:
    with Interrupt(raise_from=0) as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.raising_from(1):
            signal.raise_signal(signal.SIGINT)
        interrupt.clear()
        with pytest.raises(KeyboardInterrupt), interrupt.raising_from(2):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        interrupt.clear()
        with interrupt.raising_from(2), interrupt.raising_from(0):
            for _ in range(5):
                signal.raise_signal(signal.SIGHUP)
        assert interrupt.exit_code == 128 + signal.SIGHUP


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# --- sessions -----------------------------------------------------------------------------------------------------


def test_a_session_is_saved_at_every_turn_and_no_signal_interrupts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fake_engine import FakeChat

    fake, path, saves = install(monkeypatch), tmp_path / "s", []
    plain_save = FakeChat.save

    def save(self: FakeChat, to: Path) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        saves.append(len(self.messages))
        return plain_save(self, to)

    result = call("chat", "--session", str(path), stdin="one\ntwo\n")
    assert result.exit_code == 0 and path.exists()
    monkeypatch.setattr(FakeChat, "save", save)
    result = call("chat", "--session", str(path), stdin="three\nnever asked\n")
    assert (result.exit_code, saves) == (143, [6])
    assert '"three"' in path.read_text() and "never" not in path.read_text()
    assert fake.engine.closed
    assert call("chat", "--session", str(tmp_path / "t"), stdin="one\n").exit_code == 143, "at the end of the input"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_an_answer_keeps_what_was_said(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake, path = install(monkeypatch), tmp_path / "s"
    fake.options = {"fault": lambda: signal.raise_signal(number)}
    result = call("chat", "--session", str(path), "--transcript", str(tmp_path / "t"), stdin="one\ntwo\n")
    assert (result.exit_code, result.stdout) == (128 + number, "Two rivers meet \n")
    assert "Two rivers meet " in path.read_text() and "two" not in path.read_text()
    assert "Two rivers meet" in (tmp_path / "t").read_text()
