"""What memory lost comes back when a question asks for it: by the engine, the command, and from sessions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needles import GREEDY, LANTERN, MILL, OpenEngine, answer, document
from processes import call, environment

import kvlocal
from kvlocal.engine.chat import Chat
from kvlocal.errors import KVError, UsageError
from kvlocal.policies import make_policy
from kvlocal.retrieval import make_retriever
from kvlocal.storage.archive import Archive

TURN = Archive(budget=64)
TEXT = document(LANTERN, MILL, before=20, after=30)
QUESTION = LANTERN.question


def ask(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text, 24, GREEDY))


@pytest.mark.parametrize(
    ("policy", "budget", "config"),
    [
        ("streaming", "3%", {}),
        ("ada-snapkv", "6%", {}),
        ("ladder", "3%", {}),
        ("h2o", "6%", {}),
        ("buzz", "6%", {}),
        ("streaming", "64", {"prefill": "chunked", "chunk": 128}),
        ("snapkv", "64", {"prefill": "chunked", "chunk": 96}),
        ("streaming", "64", {"prefill": "chunked", "chunk": 24}),
        ("streaming", "3%", {"kernels": "portable"}),
        ("streaming", "3%", {"archive": Archive(budget=64, storage="q8")}),
    ],
    ids=str,
)
def test_a_later_question_finds_what_was_evicted(
    policy: str, budget: str, config: dict[str, object], open_engine: OpenEngine
) -> None:
    found = {}
    for archive in (None, config.get("archive", TURN)):
        engine = open_engine(policy, budget, **{**config, "archive": archive})
        chat = Chat(engine)
        ask(chat, TEXT)
        found[archive] = [fact.value in ask(chat, fact.question) for fact in (LANTERN, MILL)]
        report = engine.report()
        if archive is not None:
            assert report.archive is not None and report.archive.units_lost == 0 and not report.archive.error
            assert 0 < report.archive.recalled <= 64 and report.archive.bytes > 0
    assert sum(found[None]) < 2 and list(found.values())[1] == [True, True]


def test_storages_that_demote_archive_first(open_engine: OpenEngine) -> None:
    from kvlocal.storage.storage import Storage

    for name in ("kv2", "kivi"):
        engine = open_engine("full", "100%", storage=Storage.parse(name, tail=64), archive=TURN)
        chat = Chat(engine)
        ask(chat, TEXT)
        assert engine.report().archive.recalled == 0
        assert LANTERN.value in ask(chat, QUESTION), name
        found = engine.report().archive
        assert found.units_lost == 0 and 0 < found.recalled <= 64


def test_what_a_step_reads_comes_back_too(open_engine: OpenEngine) -> None:
    engine = open_engine(
        "streaming", "25%", retriever=make_retriever("sentencekv", {"budget": 512}), archive=Archive(recall="step")
    )
    engine.prefill(engine.chat_tokens([{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]))
    answer(engine, 12)
    report = engine.report()
    assert report.archive is not None and report.archive.recalled > report.archive.missed
    assert report.reads is not None and report.reads.tokens <= 512 + 64


def test_nothing_is_written_before_something_is_lost(open_engine: OpenEngine) -> None:
    engine = open_engine("ladder", "100%", archive=TURN)
    chat = Chat(engine)
    ask(chat, TEXT)
    assert LANTERN.value in ask(chat, QUESTION)
    found = engine.report().archive
    assert found is not None and (found.units, found.bytes) == (0, 0)


def test_recall_off_only_writes(open_engine: OpenEngine) -> None:
    engine = open_engine("streaming", "3%", archive=Archive(recall="off"))
    chat = Chat(engine)
    ask(chat, TEXT)
    assert LANTERN.value not in ask(chat, QUESTION)
    found = engine.report().archive
    assert found is not None and found.units > 0 and found.recalled == 0


def test_a_cache_without_room_goes_on_without(open_engine: OpenEngine) -> None:
    """What was recalled gives way to the text that comes."""
    engine = open_engine("streaming", "128", n_ctx=512, prefill="chunked", chunk=128, archive=Archive(budget=10_000))
    chat = Chat(engine)
    for text in (TEXT, QUESTION, TEXT, QUESTION):
        ask(chat, text)
    report = engine.report()
    assert report.archive is not None and report.archive.missed > 0
    assert report.kv.peak_bytes <= 1.1 * 512 * engine.cache.bytes_per_token


def test_a_session_takes_its_archive_along(open_engine: OpenEngine, tmp_path: Path) -> None:
    path = tmp_path / "trip.kvl"
    first = open_engine("streaming", "3%", archive=TURN)
    chat = Chat(first)
    ask(chat, TEXT)
    chat.save(path)
    (beside,) = tmp_path.glob("trip.kvl.archive-*")
    size = beside.stat().st_size
    ask(chat, "Who was it?")
    chat.save(path)
    assert [beside] == list(tmp_path.glob("trip.kvl.archive-*")), "it is added to"
    added = beside.stat().st_size - size
    assert 0 < added < size / 2
    wanted = ask(chat, QUESTION)
    assert LANTERN.value in wanted

    second = open_engine("streaming", "3%", archive=TURN)
    other = Chat(second)
    other.load(path)
    assert not other.left_out and ask(other, QUESTION) == wanted
    other.save(path)  # the first one's file was added to by somebody else
    chat.save(path)
    (now,) = tmp_path.glob("trip.kvl.archive-*")
    assert now != beside
    for fact in (LANTERN, MILL):
        assert fact.value in ask(chat, fact.question) and fact.value in ask(other, fact.question)

    third = Chat(open_engine("streaming", "3%"))
    third.load(path)
    assert "--archive auto takes it" in third.left_out
    fourth = Chat(open_engine("streaming", "3%", archive=TURN))
    data = now.read_bytes()
    now.write_bytes(data[:4096] + bytes(len(data) - 4096))
    fourth.load(path)
    ask(fourth, QUESTION)
    found = fourth.engine.report().archive
    assert found is not None and found.units_lost > 0 and "is damaged" in found.error
    now.unlink()
    fourth.load(path)
    assert "No such file" in fourth.left_out
    ask(fourth, QUESTION)


def test_an_archive_of_another_session_is_left_out(open_engine: OpenEngine, tmp_path: Path) -> None:
    engine = open_engine("streaming", "3%", archive=TURN)
    chat = Chat(engine)
    for name, text in (("a.kvl", TEXT), ("b.kvl", document(before=20, after=30))):
        chat.clear()
        ask(chat, text)
        chat.save(tmp_path / name)
    (a,) = tmp_path.glob("a.kvl.archive-*")
    (b,) = tmp_path.glob("b.kvl.archive-*")
    a.write_bytes(b.read_bytes())
    chat.load(tmp_path / "a.kvl")
    assert "belongs to another session" in chat.left_out


def test_the_command(tiny_path: Path, tmp_path: Path) -> None:
    session, folder = tmp_path / "s.kvl", tmp_path / "disk"
    folder.mkdir()
    options = f"chat {tiny_path} --policy streaming --budget 3% --archive {folder} --recall-budget 64 --temp 0 -n 24"
    done = call(*options.split(), "--session", session, stdin=f"{TEXT}\n")
    assert done.code == 0, done.stderr
    assert "on disk, 0 tokens recalled" in done.stdout + done.stderr
    done = call(*options.split(), "--session", session, stdin=f"{QUESTION}\n/stats\n")
    assert done.code == 0 and LANTERN.value in done.stdout, done.stderr
    assert "tokens recalled per turn, mean" in done.stdout + done.stderr
    assert list(folder.iterdir()) == []
    json_options = f"run {tiny_path} --policy streaming --budget 3% --archive auto --json -n 8"
    report = json.loads(call(*json_options.split(), "-p", QUESTION, stdin=TEXT).stdout)
    assert report["archive"]["recall"] == "turn" and report["archive"]["bytes"] > 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGINT for another process there")
def test_a_process_that_is_killed_leaves_nothing(tiny_path: Path, tmp_path: Path) -> None:
    folder, session = tmp_path / "disk", tmp_path / "s.kvl"
    folder.mkdir()
    options = f"chat {tiny_path} --policy streaming --budget 3% --archive {folder} --session {session} --temp 0 -n 24"
    command = [sys.executable, "-m", "kvlocal", *options.split()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{TEXT}\n".encode())
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not session.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.stdin.write(f"{QUESTION}\n".encode())
        process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    assert session.exists() and list(folder.iterdir()) == []
    done = call(*options.split(), stdin=f"{QUESTION}\n")
    assert done.code == 0 and LANTERN.value in done.stdout, done.stderr
    assert len(list(tmp_path.glob("s.kvl.archive-*"))) == 1


def test_a_plan_counts_what_is_recalled_and_written(tiny_path: Path) -> None:
    options = f"plan {tiny_path} --policy streaming --budget 6% -p 3000 --json"
    plans = [json.loads(call(*options.split(), *more).stdout) for more in ([], ["--archive", "auto"])]
    assert plans[0]["kv"]["archive_bytes"] == plans[0]["kv"]["recall_bytes"] == 0
    kv = plans[1]["kv"]
    assert kv["recall_bytes"] == 256 * 2048 and kv["archive_bytes"] > kv["full_bytes"] * 3000 / 3512
    assert plans[1]["total_bytes"] - plans[0]["total_bytes"] == pytest.approx(256 * 2048, rel=0.3)


def test_an_evaluation_compares(tiny_path: Path) -> None:
    options = "--policy streaming --budget 3% --ask after --lengths 1024 --archive auto --recall-budget 64,128 -o json"
    done = call("eval", "needle", tiny_path, *options.split())
    assert done.code == 0, done.stderr
    rows = {row["recalls"]: row for row in json.loads(done.stdout)["results"]}
    assert list(rows) == ["", "64 turn", "128 turn"]
    assert rows[""]["score"] < 0.5 < rows["64 turn"]["score"] and rows[""]["held"] < rows["64 turn"]["held"] < 0.1
    done = call("eval", "needle", tiny_path, "--recall-budget", "64")
    assert done.code == 2 and "no effect without --archive" in done.stderr


def test_in_python(tiny_path: Path) -> None:
    with kvlocal.load(tiny_path, policy="streaming", budget="3%", archive="auto", recall_budget=64, n_threads=1) as llm:
        talk = llm.chat()
        talk.ask(TEXT, n_predict=4, temp=0)
        assert LANTERN.value in str(talk.ask(QUESTION, n_predict=24, temp=0))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"policy": make_policy("streaming", {"positions": "rolled"})}, "nothing can be recalled beside it"),
        ({"archive": "off", "recall": "turn"}, "nothing to recall by turn without an archive"),
        ({"recall": "step"}, "needs to know what a step reads"),
        ({"retrieve": "quest", "recall": "turn"}, "give --recall step, or leave out --retrieve"),
        ({"recall_budget": 0}, "recall_budget"),
        ({"retrieve": "attention"}, "looks at what is held, and cannot recall at a step"),
        ({"archive": "/nowhere/at/all"}, "There is no folder /nowhere/at/all"),
    ],
    ids=str,
)
def test_what_does_not_fit(settings: dict[str, object], error: str, tiny_path: Path) -> None:
    with pytest.raises((UsageError, KVError), match=error):
        kvlocal.load(tiny_path, **{"archive": "auto", "policy": "streaming"} | settings).close()
