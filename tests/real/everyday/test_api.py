"""kvlocal as scripts use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvlocal

STORY = "The lighthouse keeper Ada counted ships at dusk and wrote their names into a blue book. " * 20


@pytest.fixture
def llm(default_path: Path) -> Iterator[kvlocal.LLM]:
    with kvlocal.load(default_path, policy="ada-snapkv", budget="128", n_ctx=1024, n_threads=1) as out:
        yield out


def test_a_prompt_an_answer_and_what_it_took(llm: kvlocal.LLM) -> None:
    answer = llm.generate(STORY + "Who counted ships?", n_predict=8, temp=0)
    assert answer and "".join(llm.stream(STORY + "Who counted ships?", n_predict=8, temp=0)) == answer
    report = llm.kv
    assert report.text == answer and report.tokens.prompt > 300
    assert 128 <= report.tokens.held_mean <= 136
    assert report.kv.used_bytes < report.kv.full_bytes / 2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."}]
    assert llm.generate(messages, n_predict=4, temp=0)
    assert llm.generate("One, two, three,", n_predict=2, raw=True, temp=0).strip().startswith("four")


def test_a_conversation(llm: kvlocal.LLM, tmp_path: Path) -> None:
    talk = llm.chat("Be brief.")
    first = talk.ask(STORY + "Who counted ships?", n_predict=12, temp=0)
    assert talk.again(n_predict=12, temp=0) == first
    talk.save(tmp_path / "s")
    pieces = list(talk.stream("And when?", n_predict=6, temp=0))
    assert talk.messages[-1]["content"] == "".join(pieces)
    assert talk.undo() == "And when?"
    other = llm.chat(session=tmp_path / "s")
    assert other.ask("And when?", n_predict=6, temp=0) == "".join(pieces) and not other.reread


def test_what_makes_no_sense_is_one_sentence(default_path: Path, llm: kvlocal.LLM) -> None:
    for options, reason in (
        ({"policy": "nonsense"}, "nonsense"),
        ({"budget": "lots"}, "not a budget"),
        ({"kv": "q5"}, "no storage 'q5'"),
        ({"policy": "ladder", "kv": "q4"}, "says itself how tokens are stored"),
        ({"policy": llm.engine.policy, "policy_args": {"window": 8}}, "policy_args"),
    ):
        with pytest.raises(kvlocal.UsageError, match=reason):
            kvlocal.load(default_path, **options)
    with pytest.raises(kvlocal.UsageError, match="the temperature|The temperature"):
        llm.generate("Hello", temp=-1)
    with pytest.raises(kvlocal.UsageError, match="raw=True"):
        llm.generate([{"role": "user", "content": "Hello"}], raw=True)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import kvlocal, sys; assert not {'numpy', 'kvlocal.native.library'} & sys.modules.keys(); kvlocal.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(kvlocal, "nonsense")  # noqa: B009
