"""Where the results of a batch go: a file that can be gone on with, a pipe."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvlocal.batch.results import Results
from kvlocal.errors import KVError, UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(name: str, error: str | None = None) -> dict[str, Any]:
    return {"id": name, "source": name, "text": "…", "error": error}


def test_results_are_lines_and_a_second_run_must_say_that_it_goes_on(folder: Path) -> None:
    out = folder / "out.jsonl"
    with Results(out) as results:
        results.put(line("ä"))
        with pytest.raises(UsageError, match="Another run is writing"):
            Results(out)
    assert [json.loads(text) for text in out.read_text("utf-8").splitlines()] == [line("ä")]
    with pytest.raises(UsageError, match="holds 1 results already; go on with --resume"):
        Results(out)
    with Results(out, resume=True) as results:
        assert results.done == {"ä"}
        results.put(line("b"))
    assert len(out.read_text("utf-8").splitlines()) == 2


def test_failed_lines_are_taken_out_to_be_tried_again(folder: Path) -> None:
    out = folder / "out.jsonl"
    with Results(out) as results:
        for name, error in (("a", None), ("b", "It failed."), ("c", None)):
            results.put(line(name, error))
    with Results(out, resume=True) as results:
        assert results.done == {"a", "c"}
        results.put(line("b"))
        with pytest.raises(UsageError, match="Another run"):
            Results(out, resume=True)
    assert [json.loads(text)["id"] for text in out.read_text().splitlines()] == ["a", "c", "b"]


def test_a_file_of_something_else_is_refused_and_stays(folder: Path) -> None:
    for text in ('{"id": 1}\n', "notes\n", "[1]\n"):
        Path("x").write_text(text)
        for resume in (True, False):
            with pytest.raises(UsageError, match="x, line 1"):
                Results(Path("x"), resume=resume)
        assert Path("x").read_text() == text


@given(names=st.lists(st.text(max_size=5), unique=True, max_size=6), cut=st.integers(0, 400), data=st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_wherever_a_run_was_killed_every_document_is_there_once_in_the_end(
    names: list[str], cut: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("killed") / "out.jsonl"
    with Results(out) as results:
        for name in names:
            results.put(line(name, data.draw(st.sampled_from([None, None, "It failed."]))))
    whole = out.read_bytes()
    out.write_bytes(whole[:cut])
    with Results(out, resume=True) as results:
        for name in names:
            if name not in results.done:
                results.put(line(name))
    written = [json.loads(text)["id"] for text in out.read_text("utf-8").split("\n")[:-1]]
    assert sorted(written) == sorted(names)


def test_a_link_stays_a_link(folder: Path) -> None:
    with Results(folder / "real.jsonl") as results:
        results.put(line("a", "It failed."))
    (folder / "link.jsonl").symlink_to("real.jsonl")
    with Results(folder / "link.jsonl", resume=True) as results:
        results.put(line("a"))
    assert (folder / "link.jsonl").is_symlink()
    assert json.loads((folder / "real.jsonl").read_text())["error"] is None


SETTINGS = {
    "model": "m.gguf 0123",
    "instruction": "Summarize. " * 20,
    "policy": "ladder",
    "budget": "2048",
    "raw": False,
}


def test_every_line_says_what_it_was_made_with(folder: Path) -> None:
    with Results(folder / "out.jsonl", settings=SETTINGS) as results:
        results.put(line("a"))
    (row,) = (json.loads(text) for text in (folder / "out.jsonl").read_text("utf-8").splitlines())
    assert row["id"] == "a" and row["settings"]["policy"] == "ladder" and row["settings"]["raw"] is False
    assert len(row["settings"]["instruction"]) < 100, "of a long text the beginning and a hash"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": "Translate."}, "another instruction"),
        ({"instruction": SETTINGS["instruction"] + "."}, "another instruction"),
        ({"policy": "snapkv"}, "another policy: 'ladder', now 'snapkv'"),
        ({"budget": "25%"}, "another budget: '2048', now '25%'"),
        ({"model": "m.gguf 4567"}, "another model"),
        ({"raw": True}, "another use of the chat template"),
        ({"system": "Be brief."}, "another system prompt (-sys): none, now 'Be brief.'"),
        ({"sampling": "temp=0"}, "another sampling"),
    ],
)
def test_results_of_other_settings_are_not_mixed(change: dict[str, Any], said: str, folder: Path) -> None:
    out = folder / "out.jsonl"
    with Results(out, settings=SETTINGS) as results:
        results.put(line("a"))
        results.put(line("b", "It failed."))
    before = out.read_bytes() + b'{"id": "torn'
    out.write_bytes(before)
    with pytest.raises(UsageError) as caught:
        Results(out, resume=True, settings=SETTINGS | change)
    assert said in str(caught.value) and "out.jsonl, line 1" in str(caught.value) and "-o" in str(caught.value)
    assert "\n" not in str(caught.value) and out.read_bytes() == before, "nothing is lost"
    with Results(out, resume=True, settings=dict(reversed(SETTINGS.items()))) as results:
        assert results.done == {"a"}


def test_one_line_of_other_settings_is_enough(folder: Path) -> None:
    out = folder / "out.jsonl"
    for name, settings in (("a", SETTINGS), ("b", SETTINGS | {"budget": "50%"})):
        with Results(folder / name, settings=settings) as results:
            results.put(line(name))
    out.write_bytes((folder / "a").read_bytes() + (folder / "b").read_bytes())
    with pytest.raises(UsageError, match="line 2 was made with another budget"):
        Results(out, resume=True, settings=SETTINGS)


def test_a_pipe_is_written_to_and_not_gone_on_with(folder: Path) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text("utf-8")))
    reader.start()
    with Results(pipe) as results:
        results.put(line("a"))
    reader.join()
    assert [json.loads(text)["id"] for text in got[0].splitlines()] == ["a"]
    for path in (Path("/dev/null"), None):
        with pytest.raises(UsageError, match="cannot be gone on with"):
            Results(path, resume=True)


def test_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with Results(None) as results:
        results.put(line("ä"))
    assert json.loads(capfdbinary.readouterr().out)["id"] == "ä"


def test_a_full_device_is_one_sentence(folder: Path) -> None:
    with Results(Path("/dev/full")) as results, pytest.raises(KVError, match="/dev/full cannot be written: No space"):
        results.put(line("a"))
