"""`kvlocal batch` on the default model: together or one by one, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from needles import OpenEngine
from processes import COMMAND, TIMEOUT_S, call, environment

from kvlocal.batch.batch import Batch
from kvlocal.batch.documents import Document
from kvlocal.batch.prompt import Prompt
from kvlocal.engine.evictor import Event
from kvlocal.engine.sequence import Sequence
from kvlocal.errors import KVError
from kvlocal.native.sampling import Sampling

STORY = "The lighthouse keeper Ada counted ships at dusk and wrote their names into a blue book. "
TEXTS = {f"d{i}": STORY * (3 + 5 * i) + f"On day {i} there were {i + 2} ships." for i in range(5)}
DOCUMENTS = [Document(name, name, text) for name, text in TEXTS.items()]
GREEDY = Sampling(temp=0)


def run(open_engine: OpenEngine, parallel: int, **config: Any) -> dict[str, Any]:
    options = {"policy": "ada-snapkv", "budget": "64", "n_ctx": 1024} | config
    engine = open_engine(n_seq_max=parallel + 1, n_pool=parallel * 1024 + 64, **options)
    batch = Batch(engine, Prompt("Be brief.", "Summarize the text."), 12, GREEDY)
    out = {result.id: result for result in batch.run(DOCUMENTS)}
    assert not any(sequence.tokens for sequence in engine.sequences[1:]), "all sequences are given back"
    return out


@pytest.mark.parametrize(("policy", "budget"), [("full", "100%"), ("ada-snapkv", "64"), ("ladder", "64")])
def test_together_as_one_by_one(policy: str, budget: str, open_engine: OpenEngine) -> None:
    alone = run(open_engine, 1, policy=policy, budget=budget)
    together = run(open_engine, 3, policy=policy, budget=budget)
    assert list(alone) == list(TEXTS) and together.keys() == TEXTS.keys()
    same = sum(alone[name].text == together[name].text for name in TEXTS)
    assert same >= 4, "but for rounding, as products of several rows are summed up in another order"
    for name, result in together.items():
        assert result.error is None and result.finish_reason in ("stop", "length")
        assert result.tokens == {**alone[name].tokens, "generated": result.tokens["generated"]}
        assert 0 < result.kv["used_bytes"] <= result.kv["full_bytes"]
        assert policy != "ada-snapkv" or 64 <= result.kv["held_mean"] < 64 + 32 + 12


def test_the_answer_is_that_of_a_conversation(open_engine: OpenEngine) -> None:
    """What is common and what is not make the prompt that the template makes of both."""
    result = run(open_engine, 2, policy="full", budget="100%")["d1"]
    engine = open_engine(policy="full", n_ctx=1024)
    question = f"Summarize the text.\n\n{TEXTS['d1']}"
    tokens = engine.chat_tokens([{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}])
    engine.prefill(tokens)
    assert "".join(engine.generate(12, GREEDY)) == result.text
    assert result.tokens["prompt"] == len(tokens)


def test_control_tokens_in_a_document_are_text(open_engine: OpenEngine) -> None:
    engine = open_engine(policy="full", n_ctx=1024, n_seq_max=2)
    batch = Batch(engine, Prompt(None, "Summarize."), 1, GREEDY)
    (result,) = batch.run([Document("x", "x", "<|im_end|>")])
    plain = engine.tokenize("<|im_end|>", add_special=False)
    assert len(plain) > 1 and result.tokens["prompt"] >= len(plain) + 3


def test_what_is_longer_than_the_context_is_read_in_chunks_or_fails(open_engine: OpenEngine) -> None:
    long = Document("long", "long", STORY * 60)
    documents = [long, *DOCUMENTS[:2]]
    engine = open_engine(policy="ada-snapkv", budget="64", n_ctx=768, n_seq_max=3, chunk=256)
    results = {r.id: r for r in Batch(engine, Prompt(None, "Summarize."), 4, GREEDY).run(documents)}
    assert [results[name].kv["prefill"] for name in ("long", "d0", "d1")] == ["chunked", "exact", "exact"]
    assert results["long"].tokens["prompt"] > 1000
    engine = open_engine(policy="full", n_ctx=512, n_seq_max=3, n_pool=1100)
    results = {r.id: r for r in Batch(engine, Prompt(None, "Summarize."), 4, GREEDY).run(documents)}
    assert "context has room for" in str(results["long"].error) and results["long"].text == ""
    assert results["d0"].error is None and results["d1"].error is None


def test_a_budget_in_bytes_is_for_all_together(default_path: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in TEXTS.items()))
    out = tmp_path / "out.jsonl"
    result = call(
        "batch", str(default_path), str(tmp_path / "d.jsonl"), "-o", str(out), "--task", "summarize", "--parallel", "2",
        "--policy", "snapkv", "--budget", "6MiB", "-n", "8", "--temp", "0",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {row["id"] for row in rows} == TEXTS.keys()
    most = max(row["kv"]["used_bytes"] for row in rows)
    assert 1.5 * 2**20 < most <= 3 * 2**20 + 40 * 23040, "half of the bytes, and the answer"
    assert "5 documents · " in result.stderr and "documents/h" in result.stderr


def test_killed_and_resumed_every_document_is_there_once(default_path: Path, tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    out = tmp_path / "results" / "out.jsonl"
    out.parent.mkdir()
    command = [
        "batch", str(default_path), str(tmp_path), "-o", str(out), "--instruction", "Summarize.", "--parallel", "2",
        "--policy", "ada-snapkv", "--budget", "64", "-n", "24", "--temp", "0", "--ignore-eos",
    ]  # fmt: skip
    process = subprocess.Popen([*COMMAND, *command], env=environment(), stderr=subprocess.PIPE)
    end = time.monotonic() + TIMEOUT_S
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    n_before = out.read_bytes().count(b"\n")
    assert 2 <= n_before < 6
    assert call(*command).code == 2, "a file that is there is not written over"
    result = call(*command, "--resume")
    assert result.code == 3, "the file that is not UTF-8"
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert sorted(Path(row["id"]).name for row in rows) == sorted(["bad.txt", *(f"{name}.txt" for name in TEXTS)])
    assert [Path(row["id"]).name for row in rows if row["error"]] == ["bad.txt"]
    assert all(row["tokens"]["generated"] == 24 for row in rows if not row["error"])
    assert "of 6 documents are in" in result.stderr


def test_a_failed_eviction_fails_its_document_alone(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(policy="ada-snapkv", budget="64", n_ctx=1024, n_seq_max=4, evict_every=4)
    evictor, seen = engine.evictor, []
    after = evictor.after

    def fail(sequence: Sequence, event: Event, **how: Any) -> bool:
        if event == "step" and not seen:
            seen.append(sequence)
            raise KVError("no scores today.")
        return after(sequence, event, **how)

    monkeypatch.setattr(evictor, "after", fail)
    long = [Document(f"l{i}", "", STORY * 8) for i in range(3)]
    options = Sampling(temp=0, ignore_eos=True)
    results = list(Batch(engine, Prompt(None, "Summarize."), 24, options).run(long))
    assert sorted(str(result.error) for result in results) == ["None", "None", "no scores today."]
    assert all(result.tokens["generated"] == 24 for result in results if result.error is None)
