"""Documents of a batch: listed first, read when their turn comes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kvlocal.batch.documents import Document, Documents, Fields, read_documents
from kvlocal.batch.results import Results
from kvlocal.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, *rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def read(*inputs: str, **fields: str) -> list[Document]:
    return list(read_documents(inputs, Fields(**fields)))


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


def test_suffixes_have_any_case(folder: Path) -> None:
    for name in ("a/1.TXT", "a/2.Md", "a/3.pdf"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"text of {name}")
    write("a/4.JSONL", {"id": "four", "text": "4"})
    assert [d.id for d in read("a")] == ["a/1.TXT", "a/2.Md", "four"]
    assert [d.text for d in read("a/4.JSONL")] == ["4"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder: Path) -> None:
    rows = b'{"id": "a", "text": "A"}\r\n{"id": "b", "text": "B"}\r\n'
    Path("d.jsonl").write_bytes(b"\xef\xbb\xbf" + rows)
    assert [(d.id, d.text, d.fault) for d in read("d.jsonl")] == [("a", "A", None), ("b", "B", None)]
    Path("d.jsonl").write_bytes(rows + b"\xef\xbb\xbf" + rows.replace(b'"a"', b'"c"').replace(b'"b"', b'"d"'))
    assert "line 3: not JSON" in str(read("d.jsonl")[2].fault), "only at the beginning of a file"


def test_texts_are_read_when_their_turn_comes_and_not_kept(folder: Path) -> None:
    write("d.jsonl", {"id": "a", "text": "A" * 1000}, {"id": "b", "text": "B"})
    Path("e.txt").write_text("E" * 500)
    found = read_documents(["d.jsonl", "e.txt"], Fields())
    assert len(found) == 3
    assert "AAAA" not in repr(vars(found)) and "EEEE" not in repr(vars(found))
    Path("e.txt").write_text("later")
    assert [d.text for d in found] == ["A" * 1000, "B", "later"]
    assert [d.text for d in found] == ["A" * 1000, "B", "later"], "more than once"
    sizes = [(n, read().id) for n, read in found.largest_first()]
    assert [name for _, name in sizes] == ["a", "e.txt", "b"] and all(n >= 1 for n, _ in sizes)
    assert [d.id for d in found.without({"a"})] == ["b", "e.txt"] and len(found.without({"a", "b"})) == 1


def test_a_line_that_changes_meanwhile_is_a_fault_of_that_document(folder: Path) -> None:
    write("d.jsonl", {"id": "a", "text": "A"}, {"id": "b", "text": "B"})
    found = read_documents(["d.jsonl"], Fields())
    write("d.jsonl", {"id": "x", "text": "A"}, {"id": "b", "text": "B"})
    assert [(d.id, d.fault) for d in found] == [("a", "d.jsonl:1 was changed while the batch went on."), ("b", None)]
    Path("d.jsonl").unlink()
    assert all("cannot be read" in str(d.fault) and d.id in "ab" for d in found)


def test_a_pipe_is_read_once(folder: Path) -> None:
    for name, data in (("p.txt", "a text"), ("q.jsonl", '{"id": "x", "text": "X"}\n')):
        os.mkfifo(name)
        writer = threading.Thread(target=Path(name).write_text, args=(data,))
        writer.start()
        found = read_documents([name], Fields())
        writer.join()
        assert [d.text for d in found] == [d.text for d in found] == ["a text" if name == "p.txt" else "X"]


def test_a_question_for_those_that_have_none(folder: Path) -> None:
    write("d.jsonl", {"id": "a", "text": "A", "question": "Why?"}, {"id": "b", "text": "B"})
    found = read_documents(["d.jsonl"], Fields())
    assert [d.question for d in found.asked("Who?")] == ["Why?", "Who?"]
    assert ["There is no question" in str(d.fault) for d in found.asked("", needed=True)] == [False, True]
    assert [d.question for d in Documents.of(list(found)).asked("Who?")] == ["Why?", "Who?"]


def test_a_name_that_is_not_utf8_can_be_written(folder: Path) -> None:
    name = os.fsdecode(b"bad\xff.txt")
    Path(name).write_text("text")
    (document,) = read(name)
    assert document.text == "text" and document.id.encode() and document.source.encode()
