"""`kvlocal run` with a fake engine: transcripts, the JSON object, prompts, errors and exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import ANSWER, FIGURES, Fake, call, fail, install, press_ctrl_c, sentence
from kvlocal_cli.options.settings import SamplingSettings, Settings
from kvlocal_cli.terminal import prompt

from kvlocal.errors import KVError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


# --- the answer, the figures, the defaults ----------------------------------------------------------------------


def test_run_writes_the_answer_to_stdout_and_the_figures_to_stderr(fake: Fake) -> None:
    result = call("run", "-p", "Which rivers meet?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, ANSWER + "\n", FIGURES + "\n")
    assert fake.engine.messages == [{"role": "user", "content": "Which rivers meet?"}]
    assert fake.engine.closed


def test_run_has_the_documented_defaults(fake: Fake) -> None:
    call("run", "-p", "x")
    assert fake.settings == Settings(
        model=None,
        policy="ladder",
        policy_args={},
        budget="2048",
        n_ctx=0,
        n_batch=2048,
        n_ubatch=512,
        n_threads=0,
        n_gpu_layers=0,
        prefill="exact",
        chunk=512,
    )
    assert fake.engine.n_predict == 512
    assert fake.engine.sampling == SamplingSettings(0.8, 40, 0.95, 0.05, 1.0, -1)


def test_with_a_storage_the_default_policy_is_one_that_leaves_the_storage_alone(fake: Fake) -> None:
    call("run", "-p", "x", "--kv", "q4")
    assert fake.settings is not None and (fake.settings.policy, fake.settings.storage) == ("ada-snapkv", "q4")
    call("run", "-p", "x", "--kv", "q4", "--policy", "streaming")
    assert fake.settings.policy == "streaming"
    call("run", "-p", "x", "--kv", "f16")
    assert fake.settings.policy == "ladder"


def test_run_passes_every_short_flag_on(fake: Fake) -> None:
    line = (
        "run my.gguf -p x -c 4096 -n -1 -b 1024 -ub 256 -t 3 -ngl 99 -s 7 --temp 0 --top-k 5 --top-p 0.5 --min-p 0.1"
        " --repeat-penalty 1.1 -sys Short --policy snapkv --policy-arg pool=avg --policy-arg kernel=5 --budget 25%"
        " --kv-sink 4 --kv-window 16 --prefill chunked --chunk 128 --kernels portable"
    )
    assert call(*line.split()).exit_code == 0
    assert fake.settings == Settings(
        model="my.gguf",
        policy="snapkv",
        policy_args={"pool": "avg", "kernel": "5", "sink": "4", "window": "16"},
        budget="25%",
        n_ctx=4096,
        n_batch=1024,
        n_ubatch=256,
        n_threads=3,
        n_gpu_layers=99,
        kernels="portable",
        prefill="chunked",
        chunk=128,
    )
    assert fake.engine.n_predict == -1
    assert fake.engine.sampling == SamplingSettings(0.0, 5, 0.5, 0.1, 1.1, 7)
    assert fake.engine.messages[0] == {"role": "system", "content": "Short"}


def test_run_knows_the_long_flags_and_attached_values(fake: Fake) -> None:
    line = (
        "run --prompt=x --ctx-size=4096 --n-predict=3 --batch-size=64 --ubatch-size=32 --threads=2"
        " --n-gpu-layers=1 --seed=5 --system-prompt=Short"
    )
    assert call(*line.split()).exit_code == 0
    assert call("run", "-px", "-c4096", "-n3", "-b64", "-ub=32", "-t2", "-ngl=1", "-s5", "-sys=Short").exit_code == 0
    long, short = fake.engines
    assert (long.settings, long.n_predict, long.sampling) == (short.settings, short.n_predict, short.sampling)
    assert short.settings.n_ubatch == 32 and short.settings.n_gpu_layers == 1 and short.messages == long.messages


@pytest.mark.parametrize("flag", ["-hf", "--hf"])
def test_hf_is_another_spelling_of_the_model(fake: Fake, flag: str) -> None:
    assert call("run", flag, "someone/model:q8.gguf", "-p", "x").exit_code == 0
    assert fake.settings.model == "hf:someone/model:q8.gguf"
    assert "give one of them" in sentence("run", "other.gguf", flag, "someone/model", "-p", "x")


def test_the_figures_say_why_an_answer_was_cut(fake: Fake) -> None:
    result = call("run", "-p", "x", "-n", "2")
    assert result.stdout == "Two rivers \n"
    assert result.stderr == FIGURES + " · cut at the token limit\n"


def test_no_stream_writes_the_same_answer(fake: Fake) -> None:
    assert call("run", "-p", "x", "--no-stream").stdout == ANSWER + "\n"


def test_an_answer_that_ends_with_a_newline_gets_no_other(fake: Fake) -> None:
    fake.options = {"words": ("a", "\n")}
    assert call("run", "-p", "x").stdout == "a\n"
    assert call("run", "-p", "x", "--no-stream").stdout == "a\n"


def test_json_is_the_report_and_nothing_else(fake: Fake) -> None:
    fake.options = {"words": ("Größe ", "7")}
    result = call("run", "-p", "x", "--json", "--policy", "snapkv", "--kv-window", "16")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1 and result.stderr == ""
    assert json.loads(result.stdout) == fake.engine.report().as_dict()
    assert '"text": "Größe 7"' in result.stdout
    assert list(json.loads(result.stdout)) == [
        "text",
        "model",
        "policy",
        "policy_args",
        "budget",
        "tokens",
        "kv",
        "reads",
        "archive",
        "rss",
        "timing",
        "finish_reason",
    ]


def test_no_chat_template_continues_the_text(fake: Fake) -> None:
    call("run", "-p", "Once upon a time", "--no-chat-template")
    assert (fake.engine.raw, fake.engine.messages) == ("Once upon a time", [])
    assert "chat template" in sentence("run", "-p", "x", "--no-chat-template", "-sys", "y")


# --- where the prompt comes from --------------------------------------------------------------------------------


def test_the_document_comes_first_then_a_blank_line_then_the_question(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "report.txt"
    file.write_text("The Rhine.\nThe Moselle.\n\n", encoding="utf-8")
    both = "The Rhine.\nThe Moselle.\n\nWhere?"
    for args, stdin, expected in (
        (["-f", str(file)], "ignored", "The Rhine.\nThe Moselle."),
        (["-f", str(file), "-p", "Where?"], "ignored", both),
        (["-p", "Where?"], file.read_text(), both),
        ([], file.read_text(), "The Rhine.\nThe Moselle."),
        (["-f", "-", "-p", "Where?"], file.read_text(), both),
        (["-p", "Where?"], "", "Where?"),
    ):
        assert call("run", *args, stdin=stdin).exit_code == 0
        assert fake.engine.messages == [{"role": "user", "content": expected}]


def test_a_byte_order_mark_and_windows_newlines_are_no_text(fake: Fake) -> None:
    call("run", stdin=b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert fake.engine.messages[0]["content"] == "one\ntwo"


def test_without_a_prompt_at_a_terminal_the_error_says_how_to_give_one(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "stdin_is_terminal", lambda: True)
    assert sentence("run") == "there is no prompt; give one with -p TEXT, with -f FILE, or through a pipe."
    assert call("run", "-p", "x").exit_code == 0
    assert len(fake.engines) == 1


@pytest.mark.parametrize("args", [[], ["-p", ""], ["-p", " \n"]])
def test_an_empty_prompt_is_an_error(fake: Fake, args: list[str]) -> None:
    assert sentence("run", *args) == "the prompt is empty; give one with -p TEXT, with -f FILE, or through a pipe."
    assert not fake.engines


def test_bad_files_are_named(fake: Fake, tmp_path: Path) -> None:
    missing, binary, empty = tmp_path / "missing.txt", tmp_path / "latin.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"caf\xe9 au lait")
    empty.write_bytes(b"\n")
    assert sentence("run", "-f", str(missing)) == f"there is no file '{missing}'."
    assert sentence("run", "-f", str(tmp_path)).startswith(f"'{tmp_path}' cannot be read: ")
    assert sentence("run", "-f", str(empty)).startswith("the prompt is empty")
    assert sentence("run", "-f", str(binary)) == (
        f"'{binary}' is not UTF-8: byte 0xe9 at offset 3; convert it to UTF-8 first."
    )
    assert sentence("run", stdin=b"\x00\xff") == (
        "standard input is not UTF-8: byte 0xff at offset 1; convert it to UTF-8 first."
    )
    assert not fake.engines


def test_arguments_that_are_not_utf8_are_refused(fake: Fake) -> None:
    assert (
        sentence("run", "-p", "caf\udce9") == "the text of -p is not UTF-8 at character 3; convert it to UTF-8 first."
    )
    assert sentence("run", "-p", "x", "-sys", "\udce9").startswith("the text of -sys is not UTF-8")


# --- errors and exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--policy", "nonsense"], "There is no policy 'nonsense'."),
        (["--policy-arg", "window"], "--policy-arg 'window' is not name=value, for example --policy-arg window=32."),
        (["--policy-arg", "=3"], "--policy-arg '=3' is not name=value, for example --policy-arg window=32."),
        (["--policy-arg", "a=1", "--policy-arg", "a=2"], "--policy-arg sets 'a' twice; give it once."),
        (
            ["--kv-sink", "4", "--policy-arg", "sink=8"],
            "--kv-sink and --policy-arg sink=… set the same parameter; give one of them.",
        ),
        (["--chunk", "64"], "--chunk has no effect without --prefill chunked; give both or neither."),
        (
            ["-n", "x"],
            "Invalid value for '-n' / '--n-predict': 'x' is not a valid whole number; see `kvlocal run --help`.",
        ),
        (
            ["-n", "-2"],
            "Invalid value for '-n' / '--n-predict': -2 is not in the range x>=-1; see `kvlocal run --help`.",
        ),
    ],
)
def test_usage_errors_are_one_sentence(fake: Fake, args: list[str], expected: str) -> None:
    assert sentence("run", "-p", "x", *args) == expected


@pytest.mark.parametrize(
    "args",
    [
        ["--temp", "-1"],
        ["--top-p", "1.5"],
        ["--repeat-penalty", "0"],
        ["-b", "0"],
        ["-ngl", "-1"],
        ["--prefill", "fast"],
        ["--unknown"],
        ["one.gguf", "two.gguf"],
    ],
)
def test_values_out_of_range_and_unknown_flags_are_usage_errors(fake: Fake, args: list[str]) -> None:
    assert sentence("run", "-p", "x", *args).endswith("see `kvlocal run --help`.")


@pytest.mark.parametrize(
    ("exception", "expected"),
    [
        (KVError("the prompt has 9 tokens,\nthe context 8"), "the prompt has 9 tokens, the context 8."),
        (MemoryError(), "out of memory; a smaller --budget, --ctx-size or model needs less."),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device."),
    ],
)
def test_failures_while_running_have_exit_code_1(fake: Fake, exception: Exception, expected: str) -> None:
    fake.options = {"prefill_fault": fail(exception)}
    assert sentence("run", "-p", "x", code=1) == expected
    assert fake.engine.closed


def test_a_failure_in_the_middle_ends_the_line_of_the_answer(fake: Fake) -> None:
    fake.options = {"fault": fail(KVError("the device is gone."))}
    result = call("run", "-p", "x")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Two rivers \n", "Error: the device is gone.\n")


def test_ctrl_c_ends_the_answer_after_the_current_piece(fake: Fake) -> None:
    fake.options = {"fault": press_ctrl_c}
    before = signal.getsignal(signal.SIGINT)
    result = call("run", "-p", "x")
    assert (result.exit_code, result.stdout) == (130, "Two rivers meet \n")
    assert result.stderr == FIGURES + " · interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_inside_the_engine_is_the_same(fake: Fake) -> None:
    fake.options = {"fault": fail(KeyboardInterrupt())}
    result = call("run", "-p", "x", "--json")
    assert result.exit_code == 130
    assert (json.loads(result.stdout)["text"], json.loads(result.stdout)["finish_reason"]) == (
        "Two rivers ",
        "interrupted",
    )


@pytest.mark.parametrize("fault", [press_ctrl_c, fail(KeyboardInterrupt())])
def test_ctrl_c_while_the_prompt_is_processed_ends_without_an_answer(fake: Fake, fault: Callable[[], None]) -> None:
    fake.options = {"prefill_fault": fault}
    result = call("run", "-p", "x")
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")
    assert fake.engine.closed


def test_ctrl_c_twice_does_not_wait_for_the_current_piece(fake: Fake) -> None:
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    fake.options = {"fault": twice}
    result = call("run", "-p", "x")
    assert (result.exit_code, result.stdout) == (130, "Two rivers \n")


def test_a_closed_pipe_ends_quietly(fake: Fake) -> None:
    fake.options = {"fault": fail(BrokenPipeError(32, "Broken pipe"))}
    result = call("run", "-p", "x")
    assert (result.exit_code, result.stderr) == (1, "")
