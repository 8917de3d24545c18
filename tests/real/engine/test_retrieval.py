"""Reading a part of what is held, through the engine: facts are found, and a text that was changed is as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from needles import FILLER, GATE, GREEDY, LANTERN, MILL, OpenEngine, answer, document, prompt
from processes import call

from kvlocal.engine import session
from kvlocal.engine.chat import Chat
from kvlocal.errors import UsageError
from kvlocal.retrieval import make_retriever

QUESTION = LANTERN.question


def long_document() -> str:
    """Of 1,900 tokens of the tiny model."""
    return " ".join([document(LANTERN, before=3, after=20), document(GATE, MILL, before=10, after=10)])


@pytest.mark.parametrize("policy", ["full", "ladder"])
@pytest.mark.parametrize("name", ["sentencekv", "quest"])
def test_a_fact_is_found_in_a_part(name: str, policy: str, open_engine: OpenEngine) -> None:
    engine = open_engine(policy, "100%" if policy == "full" else "60%", retriever=make_retriever(name, {"budget": 512}))
    engine.prefill(prompt(engine, long_document(), QUESTION))
    assert LANTERN.value in answer(engine)
    reads = engine.report().reads
    assert reads is not None and reads.retriever == f"{name} 512" and reads.index_bytes > 0
    n_layer, n_all = len(engine.held()), len(engine.sequences[0].tokens)
    dense = 2 if name == "quest" else 0
    assert n_all > 1000 and reads.tokens <= (dense * n_all + (n_layer - dense) * (512 + 64)) / n_layer


def test_without_the_right_part_it_is_not(open_engine: OpenEngine) -> None:
    engine = open_engine("full", retriever=make_retriever("recent", {"budget": 512}))
    engine.prefill(prompt(engine, long_document(), QUESTION))
    assert LANTERN.value not in answer(engine)


def test_the_next_question_is_read_over_all_that_is_held(open_engine: OpenEngine) -> None:
    """What the first answer read does not bound the second one."""
    engine = open_engine("full", retriever=make_retriever("sentencekv", {"budget": 512}))
    chat = Chat(engine, None)
    text = long_document()
    first = "".join(chat.ask(f"{text}\n\n{QUESTION}", 24, GREEDY))
    second = "".join(chat.ask(MILL.question, 24, GREEDY))
    assert LANTERN.value in first and MILL.value in second
    again = "".join(chat.again(24, GREEDY))
    assert again == second


def test_a_branch_and_a_cut_leave_no_trace(open_engine: OpenEngine) -> None:
    engine = open_engine("full", n_seq_max=2, retriever=make_retriever("sentencekv", {"budget": 512}))
    one, other = engine.sequences
    tokens = prompt(engine, long_document(), QUESTION)
    engine.prefill(tokens, sequence=one)
    want = "".join(engine.generate(24, GREEDY, sequence=one))
    assert one.cut(len(tokens) - 30)
    one.branch(other)
    for sequence in (one, other):
        engine.extend(tokens, sequence=sequence)
        assert "".join(engine.generate(24, GREEDY, sequence=sequence)) == want
        assert all(end < len(sequence.tokens) for end in sequence.units)


def test_a_session_goes_on(open_engine: OpenEngine, tmp_path: Path) -> None:
    def engine_() -> object:
        return open_engine("ada-snapkv", "60%", retriever=make_retriever("sentencekv", {"budget": 512}))

    first, second = engine_(), engine_()
    tokens = prompt(first, long_document(), QUESTION)
    first.prefill(tokens)
    session.save(tmp_path / "s.kvl", first, session.Session())
    want = answer(first)
    session.load(tmp_path / "s.kvl", second)
    assert not second.sequences[0].narrowed and second.sequences[0].tokens == tokens
    whole = open_engine("ada-snapkv", "60%")
    assert not session.load(tmp_path / "s.kvl", whole).dropped and whole.sequences[0].tokens == tokens
    more = second.tokenize(" So", add_special=False)
    second.prefill(more)
    assert second.report().reads is not None and LANTERN.value in want


@pytest.mark.parametrize("prefill", ["exact", "chunked"])
def test_in_every_way_to_read(prefill: str, open_engine: OpenEngine) -> None:
    engine = open_engine(
        "ada-snapkv", "700", prefill=prefill, chunk=128, retriever=make_retriever("sentencekv", {"budget": 256})
    )
    engine.prefill(engine.tokenize(FILLER * 60))
    answer(engine)
    reads = engine.report().reads
    assert reads is not None and 96 < reads.tokens <= 256 + 64


def test_renumbered_tokens_have_no_units(open_engine: OpenEngine) -> None:
    with pytest.raises(UsageError, match="leave out --retrieve quest, or positions=rolled"):
        open_engine("streaming", "256", {"positions": "rolled"}, retriever=make_retriever("quest"))


def test_the_command(tiny_path: Path) -> None:
    options = "--policy full --retrieve sentencekv --retrieve-budget 512 --retrieve-arg sink=16 --json --temp 0 -n 24"
    done = call("run", tiny_path, *options.split(), "-p", QUESTION, stdin=long_document())
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert LANTERN.value in report["text"]
    assert report["reads"]["retriever"] == "sentencekv 512 sink=16" and report["reads"]["tokens"] < 576


def test_a_plan_counts_what_stands_for_units(tiny_path: Path) -> None:
    plans = []
    for more in ([], ["--retrieve", "quest"]):
        done = call("plan", tiny_path, "-p", "4000", "--policy", "streaming", "--json", *more)
        assert done.code == 0, done.stderr
        plans.append(json.loads(done.stdout)["kv"])
    # of every 16 keys two, in f16, of the tokens whose keys were seen
    assert plans[1]["table_bytes"] - plans[0]["table_bytes"] > 0.9 * 4000 / 16 * 2 * 64 * 2 * 8
    assert plans[1]["peak_bytes"] == plans[0]["peak_bytes"]


def test_the_policy_of_the_paper_reads_a_part(tiny_path: Path) -> None:
    options = "--policy sentencekv --budget 1024 --retrieve-budget 512 --json --temp 0 -n 24"
    done = call("run", tiny_path, *options.split(), "-p", QUESTION, stdin=long_document())
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert LANTERN.value in report["text"] and report["policy"] == "sentencekv"
    assert report["tokens"]["held_mean"] < 1100 and report["reads"]["retriever"] == "sentencekv 512"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--retrieve-budget 300", "have no effect without --retrieve NAME"),
        ("--policy snapkv --retrieve-arg sink=3", "Policy snapkv reads all that it keeps"),
        ("--retrieve-arg sink=3", "have no effect without --retrieve NAME"),
        ("--retrieve sentences", "There is no retriever 'sentences' (did you mean 'sentencekv'?)"),
        ("--retrieve quest --retrieve-arg page", "--retrieve-arg 'page' is not name=value"),
    ],
)
def test_what_is_wrong_on_the_command_line(options: str, error: str, tiny_path: Path) -> None:
    done = call("run", tiny_path, *options.split(), "-p", "hello")
    assert done.code == 2 and error in done.stderr and done.stderr.count("\n") == 1
