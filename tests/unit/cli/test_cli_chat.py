"""`kvlocal chat`: transcripts with a fake engine, and the line editor on a fake terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from fake_engine import ANSWER, FIGURES, Fake, call, fail, install, press_ctrl_c
from kvlocal_cli.commands import chat as chat_module
from kvlocal_cli.terminal import prompt
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvlocal.errors import ContextFullError, KVError

BANNER = "fake · context 4,096 · policy ladder, budget 2048 · /help lists the commands"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


def piped(stdin: str | bytes, *args: str) -> Result:
    """A chat whose standard input is no terminal."""
    return call("chat", *args, stdin=stdin)


@pytest.fixture
def typed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A chat with somebody at the keyboard, who types these lines."""

    def run(*lines: str) -> Result:
        monkeypatch.setattr(prompt, "stdin_is_terminal", lambda: True)
        monkeypatch.setattr(chat_module, "TerminalLines", lambda: iter(lines))
        return piped("")

    return run


def test_every_line_is_a_turn_on_one_engine(fake: Fake) -> None:
    result = piped("Which rivers?\n\n  \nAnd where?", "-sys", "Be short.", "--temp", "0")
    assert result.exit_code == 0
    assert result.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert result.stderr == f"{FIGURES}\n{FIGURES}\n"
    assert len(fake.engines) == 1 and fake.engine.closed
    (chat,) = fake.chats
    assert (chat.system, fake.engine.sampling.temp, fake.engine.n_predict) == ("Be short.", 0, 1024)
    assert [message["content"] for message in chat.messages] == ["Which rivers?", ANSWER, "And where?", ANSWER]


def test_answers_are_ended_by_one_newline_each(fake: Fake) -> None:
    fake.options = {"words": ("yes", "\n")}
    assert piped("a\nb\n").stdout == "yes\nyes\n"
    fake.options = {"words": ()}
    assert piped("a\nb\n").stdout == "\n\n"


def test_commands_go_to_stderr_and_are_no_turns(fake: Fake) -> None:
    result = piped("/help\n/stats\n/kv\n/clear\n/exit\nnever asked\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "/kv [LAYER | FILE.svg]       draw how every layer and head holds its tokens",
        "/stats                       show all measured figures",
        "/regen                       answer the last question again",
        "/undo                        take the last question and its answer back",
        "/read FILE                   put a text file before your next question",
        "/system [TEXT]               show or change the system prompt; none: take it away",
        "/set [NAME VALUE]            show or change a sampling setting, such as temp 0.2",
        "/policy [NAME [ARG=VALUE]…]  show or change which tokens are kept",
        "/budget [SIZE]               show or change how much is kept",
        "/save FILE                   write the conversation and its cache",
        "/load FILE                   go on with a saved conversation",
        "/clear                       forget the conversation",
        "/help                        show this list",
        "/exit                        leave (or Ctrl-D)",
        '"""  begins and ends a question of several lines',
        "There is no answer yet, so nothing was measured.",
        "The cache is empty.",
        "The conversation is cleared.",
    ]
    assert fake.chats[0].messages == []


def test_kv_draws_the_held_tokens(fake: Fake) -> None:
    lines = piped("word " * 64 + "\n/kv\n/kv 0\n").stderr.splitlines()
    assert lines[:5] == [
        FIGURES,
        "64 tokens read. Rows: layers; columns: KV heads, and tokens held.",
        "0 FFFFFF·················· 16  FFFFFF444444············ 32",
        "1 FFFFFFFFFFFFFFFFFFFFFFFF 64  888888888888888888888888 64",
        "Mean of a head:   F f16 24   8 q8 16   4 q4 4   · gone 20",
    ]
    assert [line.split() for line in lines[6:]] == [
        ["layer", "0,", "head", "f16", "q8", "q4", "held", "gone"],
        [lines[7].strip()],
        ["0", "16", "0", "0", "16", "48"],
        ["1", "16", "0", "16", "32", "32"],
    ]


def test_kv_writes_a_picture(fake: Fake, tmp_path: Path) -> None:
    result = piped(f"word word\n/kv {tmp_path / 'heads.svg'}\n/kv '{tmp_path / 'heads.txt'}'\n")
    assert (tmp_path / "heads.svg").read_text("utf-8").startswith("<svg ")
    assert result.exit_code == 2 and "does not end in .svg" in result.stderr
    assert "There is no layer 7; the layers are 0 to 1." in piped("word\n/kv 7\n").stderr


def test_kv_says_so_when_there_is_nothing_to_draw(fake: Fake) -> None:
    lines = piped("Hello\n/kv\n", "--policy", "full").stderr.splitlines()
    assert lines == [FIGURES, "Nothing is evicted with this policy: every head holds every token, in f16."]


def test_stats_shows_every_figure(fake: Fake) -> None:
    result = piped("Hello you\n/stats\n", "--policy", "snapkv", "--kv-window", "16")
    assert [" ".join(line.split()) for line in result.stderr.splitlines()[1:] if line.strip()] == [
        "model fake",
        "policy snapkv (window=16)",
        "budget 256 tokens per head = 25% = 6.0 MiB",
        "tokens of the prompt 2",
        "tokens generated 5",
        "tokens held per head, mean 256",
        "tokens held, least / most 40 / 1,024",
        "KV in use 6.0 MiB",
        "KV allocated 7.0 MiB",
        "KV peak 25.0 MiB",
        "a full f16 cache would take 24.0 MiB",
        "RSS before / after eviction 300.0 MiB / 281.0 MiB",
        "RSS peak 310.0 MiB",
        "load 0.50 s",
        "prefill 2.00 s, 512 t/s",
        "time to first token 2.25 s",
        "eviction 0.12 s",
        "decode 1.50 s, 31.2 t/s",
        "finish reason stop",
    ]


def test_clear_forgets_the_figures_too(fake: Fake) -> None:
    result = piped("Hello\n/clear\n/stats\n/kv\nHello\n")
    assert result.stderr.splitlines() == [
        FIGURES,
        "The conversation is cleared.",
        "There is no answer yet, so nothing was measured.",
        "The cache is empty.",
        FIGURES,
    ]
    assert len(fake.chats[0].messages) == 2


def test_input_that_is_not_utf8_names_the_byte(fake: Fake) -> None:
    result = piped(b"Hello\ncaf\xe9\n")
    assert (result.exit_code, result.stdout) == (2, ANSWER + "\n")
    assert result.stderr == (
        f"{FIGURES}\nError: standard input is not UTF-8: byte 0xe9 at offset 9; convert it to UTF-8 first.\n"
    )


def test_a_script_learns_of_a_failure_from_the_exit_code(fake: Fake) -> None:
    fake.options = {"fault": fail(KVError("the context is full"))}
    result = piped("a\nb\n")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Two rivers \n", "Error: the context is full.\n")


def test_at_a_terminal_a_failure_is_shown_and_the_chat_goes_on(fake: Fake, typed: Callable[..., Result]) -> None:
    fake.options = {"fault": fail(KVError("the context is full."))}
    result = typed("a", "b")
    assert (result.exit_code, result.stdout) == (0, "Two rivers \nTwo rivers \n")
    assert result.stderr.splitlines() == [BANNER, *["Error: the context is full."] * 2]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(fake: Fake, typed: Callable[..., Result]) -> None:
    fake.options = {"fault": press_ctrl_c}
    before = signal.getsignal(signal.SIGINT)
    result = typed("one", "two", "/exit")
    assert (result.exit_code, result.stdout) == (0, "Two rivers meet \n" * 2)
    assert result.stderr.splitlines() == [BANNER, *[FIGURES + " · interrupted"] * 2]
    said = [message["content"] for message in fake.chats[0].messages]
    assert said == ["one", "Two rivers meet ", "two", "Two rivers meet "]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_prompt_is_processed_keeps_the_conversation(fake: Fake, typed: Callable[..., Result]) -> None:
    fake.options = {"prefill_fault": press_ctrl_c}
    result = typed("one", "/stats")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        BANNER,
        "Interrupted before the answer began.",
        "There is no answer yet, so nothing was measured.",
    ]


def test_ctrl_c_ends_a_script(fake: Fake) -> None:
    fake.options = {"fault": press_ctrl_c}
    result = piped("one\ntwo\n")
    assert (result.exit_code, result.stdout) == (130, "Two rivers meet \n")
    assert fake.engine.closed


# --- the line editor -------------------------------------------------------------------------------------------------


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Type keys, get the lines that the chat sees."""
    monkeypatch.setattr("platformdirs.user_state_path", lambda *_, **__: tmp_path)
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **_: DummyOutput())
    from prompt_toolkit.application import create_app_session

    with create_pipe_input() as pipe, create_app_session(input=pipe):

        def press(keys: str) -> list[str]:
            pipe.send_text(keys)
            return list(chat_module.TerminalLines())

        yield press


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(keyboard: Callable[[str], list[str]]) -> None:
    assert keyboard("not this\x03but this\r\x04") == ["but this"]


def test_lines_can_be_edited_and_come_back_from_the_history(
    keyboard: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert keyboard("helo\x1b[Dl\r\x04") == ["hello"]
    assert keyboard("\x1b[A\r\x04") == ["hello"]
    assert "+hello" in (tmp_path / "history").read_text()
    if os.name == "posix":
        assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600


def test_without_a_place_for_the_history_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_state_path", lambda *_, **__: tmp_path / "missing")
    assert chat_module.history_file() is None


#
# edits
#


def said(fake: Fake) -> list[str]:
    return [message["content"] for message in fake.chats[0].messages]


def test_an_answer_again_and_a_turn_taken_back(fake: Fake) -> None:
    result = piped("One?\n/regen\nTwo?\n/undo\n")
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n" * 3)
    assert result.stderr.splitlines()[-1] == "Taken back: Two?"
    assert said(fake) == ["One?", ANSWER]


def test_what_needs_a_turn_says_so_in_a_script_by_its_exit_code(fake: Fake) -> None:
    result = piped("/undo\nnever asked\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: Nothing was asked yet, so there is nothing to take back.\n"


def test_somebody_who_types_goes_on_after_a_failed_command(fake: Fake, typed: Callable[..., Result]) -> None:
    result = typed("/undo", "/read", "/set temp warm", "/policy nonsense", "And now?")
    assert result.exit_code == 0 and result.stdout == f"{ANSWER}\n"
    assert result.stderr.splitlines()[1:5] == [
        "Error: Nothing was asked yet, so there is nothing to take back.",
        "Error: A file is missing: /read FILE.",
        "Error: /set temp takes a number, not 'warm'.",
        "Error: There is no policy 'nonsense'",
    ]


def test_a_file_goes_before_the_next_question_only(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "a text.txt"
    path.write_text("Two rivers.\n", "utf-8")
    result = piped(f"/read '{path}'\nWhich?\nAnd where?\n")
    assert result.stderr.splitlines()[0] == f"{path}: 2 tokens; they go before your next question."
    assert said(fake)[::2] == ["Two rivers.\n\nWhich?", "And where?"]


def test_a_question_of_several_lines(fake: Fake) -> None:
    piped('"""\nOne\n  two\n"""\n"""in one line"""\n"""Never\nended')
    assert said(fake)[::2] == ["One\n  two", "in one line", "Never\nended"]


def test_sampling_is_set_for_the_next_answers(fake: Fake) -> None:
    result = piped("/set temp 0.2\n/set top-k=7\n/set n-predict 3\n/set\nWhich?\n", "--temp", "1")
    assert result.stdout == "Two rivers meet \n"
    assert (fake.engine.sampling.temp, fake.engine.sampling.top_k) == (0.2, 7)
    assert result.stderr.splitlines()[:4] == [
        "temp is 0.2.",
        "top-k is 7.",
        "n-predict is 3.",
        "temp 0.2, top-k 7, top-p 0.95, min-p 0.05, repeat-penalty 1, seed -1, ignore-eos 0, n-predict 3",
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/set warmth 1", "There is no setting warmth; the settings are temp, top-k, top-p, min-p, repeat-penalty, "
         "seed, ignore-eos, n-predict."),
        ("/set top-k 1.5", "top-k is 1.5; it must be a whole number."),
        ("/set n-predict -2", "n-predict is -2; it must be a whole number, -1 or more."),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(line: str, sentence: str, fake: Fake) -> None:
    result = piped(f"{line}\n")
    assert (result.exit_code, result.stderr) == (2, f"Error: {sentence}\n")


def test_policy_and_budget_change_in_the_middle(fake: Fake) -> None:
    result = piped("/policy\n/policy snapkv window=16\n/budget 25%\n/policy h2o\n/system\n/system Be short.\nWhich?\n")
    assert fake.engine.changes == ["snapkv window=16", "25%", "h2o"]
    assert result.stderr.splitlines()[:-1] == [
        "The policy is ladder, the budget 2048.",
        "The policy is snapkv from now on; it takes effect at the next eviction.",
        "The budget is 25% from now on; it takes effect at the next eviction.",
        "The policy is h2o from now on; it needs another cache, so the conversation is read again with your next "
        "question.",
        "There is no system prompt.",
        "The system prompt has changed; the conversation is read again with your next question.",
        "The whole conversation was read again.",
    ]
    assert fake.chats[0].forgotten and fake.chats[0].system == "Be short."


def test_a_conversation_is_saved_and_goes_on(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "trip.kvl"
    first = piped("Which?\n/save copy.kvl\n/load none.kvl\n", "--session", str(path))
    assert first.exit_code == 2 and "There is no session none.kvl" in first.stderr
    assert "Saved: copy.kvl, " in first.stderr
    Path("copy.kvl").unlink()
    assert path.exists(), "a failed command loses nothing"
    second = piped("And where?\n", "--session", str(path))
    assert second.stderr.splitlines()[0] == f"{path} goes on: 1 turn, 6 tokens read."
    assert [m["content"] for m in fake.chats[1].messages] == ["Which?", ANSWER, "And where?", ANSWER]
    assert not fake.chats[1].forgotten
    piped("And when?\n", "--session", str(path), "--reread")
    assert fake.chats[2].forgotten and len(fake.chats[2].messages) == 6
    assert not piped("Which?\n", "--session", str(tmp_path / "new"), "--reread").exit_code


def test_nothing_said_leaves_no_session(fake: Fake, tmp_path: Path) -> None:
    assert piped("/help\n", "--session", str(tmp_path / "s")).exit_code == 0
    assert not (tmp_path / "s").exists()


def test_the_transcript_grows_turn_by_turn(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "said.md"
    piped("Which?\n/regen\n/undo\n/system Be short.\n", "--transcript", str(path))
    piped("And where?\n", "--transcript", str(path))
    assert path.read_text("utf-8") == (
        f"**You:** Which?\n\n{ANSWER}\n\n**You:** (again)\n\n{ANSWER}\n\n*The last turn was taken back.*\n\n"
        f"*System prompt: Be short.*\n\n**You:** And where?\n\n{ANSWER}\n\n"
    )
    result = piped("Which?\n", "--transcript", str(tmp_path / "none" / "said.md"))
    assert result.exit_code == 1 and result.stdout == ""


def test_at_the_end_of_the_context_it_says_what_to_do(fake: Fake, typed: Callable[..., Result]) -> None:
    fake.options = {"prefill_fault": fail(ContextFullError("The prompt has 9 tokens, the context has room for 3."))}
    result = typed("Which?", "/help")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[1:3] == [
        "Error: The prompt has 9 tokens, the context has room for 3.",
        "Nothing is lost: /undo takes the last turn back, /clear starts anew; with /policy ladder the cache goes on.",
    ]


def test_a_file_that_was_read_waits_for_its_question(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("Two rivers.")
    piped(f"Hi\n/read {tmp_path / 'a'}\n/regen\nWhich?\n")
    assert said(fake)[::2] == ["Hi", "Two rivers.\n\nWhich?"]


@pytest.mark.parametrize(
    "line", ["/set top-k inf", "/set n-predict nan", "/policy snapkv window='3", "/load ~nobody-x/s"]
)
def test_a_slip_of_the_keys_is_one_sentence(line: str, fake: Fake) -> None:
    result = piped(f"{line}\n")
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_a_session_needs_a_folder_at_once(fake: Fake, tmp_path: Path) -> None:
    result = piped("Which?\n", "--session", str(tmp_path / "none" / "s"))
    assert (result.exit_code, result.stdout) == (2, "") and "There is no folder" in result.stderr
