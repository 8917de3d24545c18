"""Documents of a batch, and the file of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.batch.documents import Document, Fields, Results, read_documents
from kvlocal.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, *rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def read(*inputs: str, **fields: str) -> list[Document]:
    return read_documents(inputs, Fields(**fields))


def line(name: str, error: str | None = None) -> dict[str, Any]:
    return {"id": name, "source": name, "text": "…", "error": error}


def test_files_directories_and_globs(folder: Path) -> None:
    for name in ("a/2.txt", "a/1.md", "a/b/3.txt", "a/no.pdf", "x.log"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"\ufefftext of {name}\r\n", "utf-8")
    assert [d.id for d in read("a")] == ["a/1.md", "a/2.txt", "a/b/3.txt"]
    assert [d.id for d in read("x.log", "a/*.txt")] == ["x.log", "a/2.txt"]
    assert [d.id for d in read("**/*.txt")] == ["a/2.txt", "a/b/3.txt"]
    assert [d.id for d in read_documents(["a", "a/*.md"], Fields(), Path("a/../a/1.md"))] == ["a/2.txt", "a/b/3.txt"]
    assert read("x.log") == [Document("x.log", "x.log", "text of x.log")]


def test_lines_of_a_jsonl_file(folder: Path) -> None:
    write("d.jsonl", {"id": 7, "article": " A ", "question": "Why?"}, {"article": "B", "more": 1})
    assert read("d.jsonl", text="article") == [
        Document("7", "d.jsonl:1", "A", "Why?"),
        Document("d.jsonl:2", "d.jsonl:2", "B"),
    ]


def test_what_cannot_be_read_is_a_document_with_a_fault(folder: Path) -> None:
    Path("bad.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").write_text(" \n")
    rows = ['{"text": 1}', "not json", '{"text": "x", "id": []}', '{"id": "z"}', "", '{"text": "ok", "question": 3}']
    Path("d.jsonl").write_text("\n".join(rows))
    assert [(d.id, d.fault) for d in read("bad.txt", "empty.txt", "d.jsonl")] == [
        ("bad.txt", "'bad.txt' is not UTF-8 (byte 3)."),
        ("empty.txt", "'empty.txt' is empty."),
        ("d.jsonl:1", "d.jsonl, line 1: the field 'text' must be a text; the fields are text (--field)."),
        ("d.jsonl:2", "d.jsonl, line 2: not JSON (Expecting value, column 1); give one object per line."),
        ("d.jsonl:3", "d.jsonl, line 3: the field 'id' must be a string."),
        ("z", "d.jsonl, line 4: the field 'text' must be a text; the fields are id (--field)."),
        ("d.jsonl:6", "d.jsonl, line 6: the field 'question' must be a string."),
    ]


def test_inputs_that_are_not_there_or_there_twice(folder: Path) -> None:
    write("d.jsonl", {"id": "x", "text": "1"}, {"id": "x", "text": "2"})
    Path("void").mkdir()
    for inputs, reason in (
        (["none.txt"], "There is no file 'none.txt'"),
        (["void"], "There are no documents in void"),
        ([], "There are no documents in no inputs"),
        (["d.jsonl"], "Two documents have the id 'x', d.jsonl:1 and d.jsonl:2"),
    ):
        with pytest.raises(UsageError, match=reason):
            read(*inputs)


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
@settings(max_examples=60, deadline=None)
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


def test_odd_names_and_lines_are_faults_that_can_be_written(folder: Path) -> None:
    rows = [
        '{"id":"\\ud800x","text":"a"}',
        '{"text":"x \\ud800 y"}',
        "[" * 200_000,
        '{"text":"z","n":' + "9" * 5000 + "}",
    ]
    Path("d.jsonl").write_text("\n".join(rows))
    found = read("d.jsonl")
    assert len(found) == 4 and all(document.fault for document in found)
    with Results(folder / "out.jsonl") as results:
        for document in found:
            results.put({"id": document.id, "source": document.source, "text": "", "error": document.fault})
    Path("odd.jsonl").write_text('{"id": ["a"], "text": "", "error": null}\n')
    with pytest.raises(UsageError, match="is not a result of a batch"):
        Results(Path("odd.jsonl"), resume=True)


def test_a_link_stays_a_link(folder: Path) -> None:
    with Results(folder / "real.jsonl") as results:
        results.put(line("a", "It failed."))
    (folder / "link.jsonl").symlink_to("real.jsonl")
    with Results(folder / "link.jsonl", resume=True) as results:
        results.put(line("a"))
    assert (folder / "link.jsonl").is_symlink()
    assert json.loads((folder / "real.jsonl").read_text())["error"] is None
