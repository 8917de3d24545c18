"""Chat templates that are broken, endless, or have no system role, as somebody meets them on the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tinygguf
from processes import call

import kvlocal

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
NOTE = "has no system role; the system prompt goes before the first question"
QUICK = ("--policy", "full", "-c", "256", "-n", "2", "--temp", "0", "-t", "1")


def model(folder: Path, template: str) -> Path:
    path = folder / "m.gguf"
    tinygguf.write_model(path, "llama", chat_template=template)
    return path


def test_a_template_that_does_not_compile(tmp_path: Path) -> None:
    path = model(tmp_path, "{% for m in messages %}{{ m.content }")
    result = call("run", path, *QUICK, "-p", "Hi")
    assert result.code == 2 and "does not compile" in result.stderr and "--no-chat-template" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert call("run", path, *QUICK, "-p", "Hi", "--no-chat-template").code == 0
    result = call("doctor", path)
    assert result.code == 1 and "does not compile" in result.stdout


def test_an_endless_template(tmp_path: Path) -> None:
    path = model(tmp_path, "{{ 'a' * 10 ** 10 }}")
    result = call("run", path, *QUICK, "-p", "Hi")
    assert result.code == 2 and "refuses the conversation" in result.stderr


def test_a_system_prompt_without_a_role_for_it(tmp_path: Path) -> None:
    path = model(tmp_path, NO_SYSTEM)
    result = call("run", path, *QUICK, "-p", "Hi", "-sys", "Be brief.")
    assert result.code == 0 and result.stderr.count(NOTE) == 1
    assert NOTE not in call("run", path, *QUICK, "-p", "Hi").stderr
    result = call("chat", path, *QUICK, stdin="Hi\n/system Be brief.\nHi\n/system Be long.\nHi\n")
    assert result.code == 0 and result.stderr.count(NOTE) == 1
    (tmp_path / "a.txt").write_text("A text.")
    out = tmp_path / "out.jsonl"
    result = call("batch", path, tmp_path / "a.txt", "-o", out, "--task", "summarize", *QUICK, "-sys", "Be brief.")
    assert result.code == 0 and result.stderr.count(NOTE) == 1
    with kvlocal.load(path, policy="full", n_ctx=256, n_threads=1) as llm:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        with pytest.warns(UserWarning, match=NOTE):
            llm.generate(messages, n_predict=1)
        with pytest.warns(UserWarning, match=NOTE):
            assert NOTE in str(llm.chat("Be brief.").note)


def test_a_batch_with_a_template_that_trims(tmp_path: Path) -> None:
    path = model(tmp_path, TURNS.replace("m.content", "m.content | trim"))
    (tmp_path / "a.txt").write_text(" A text.\n\n")
    result = call("batch", path, tmp_path / "a.txt", "-o", tmp_path / "out.jsonl", "--task", "summarize", *QUICK)
    assert result.code == 0, result.stderr


def test_prompts_that_make_no_sense(tmp_path: Path) -> None:
    with kvlocal.load(model(tmp_path, TURNS), policy="full", n_ctx=256, n_threads=1) as llm, warnings.catch_warnings():
        warnings.simplefilter("error")
        for raw in (False, True):
            for prompt, reason in (
                ("", "The prompt is empty"),
                (" \n", "The prompt is empty"),
                (None, "The prompt is a NoneType; give a text"),
                (5, "The prompt is a int"),
                (b"Hi", "The prompt is a bytes"),
                ("a\udc80", r"lone surrogate, U\+DC80"),
            ):
                with pytest.raises(kvlocal.UsageError, match=reason):
                    llm.generate(prompt, raw=raw)  # type: ignore[arg-type]
        for messages in ([], [{"role": "user"}], [{"role": "user", "content": None}], ["Hi"]):
            with pytest.raises(kvlocal.UsageError):
                llm.generate(messages)  # type: ignore[arg-type]
        talk = llm.chat()
        for text in ("", "\ud800", None):
            with pytest.raises(kvlocal.UsageError):
                talk.ask(text)  # type: ignore[arg-type]
        assert talk.messages == []
        with pytest.raises(kvlocal.UsageError, match="The system prompt has a lone surrogate"):
            llm.chat("\udc80")
