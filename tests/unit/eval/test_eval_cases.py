"""Cases of the evaluation: what is asked, of which document, and where in it the answer stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.errors import UsageError
from kvlocal.eval.cases import Case
from kvlocal.eval.tasks.kv_retrieval import kv_cases
from kvlocal.eval.tasks.needle import FILLER, NAMES, THINGS, needle_cases
from kvlocal.eval.tasks.ruler import ruler_cases
from kvlocal.eval.tasks.summarize import summary_cases
from kvlocal.jsonl import TEXT, read_rows

COUNTERS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "quarters": lambda text: 1 + len(text) // 4,
    "pieces": lambda text: len(re.findall(r"\w{1,5}|[^\w ]", text)),
}
KINDS, MODES = ("words", "numbers"), ("single", "multi-key", "multi-turn")
FACT = re.compile(r"The (?:code|owner) of the (\w+) is (\w+)")

grid = {
    "counter": st.sampled_from(sorted(COUNTERS)),
    "kind": st.sampled_from(KINDS),
    "mode": st.sampled_from(MODES),
    "length": st.integers(200, 2000),
    "depth": st.floats(0, 1),
    "seed": st.integers(0, 2**32),
}


def one(counter: str = "words", **options: Any) -> Case:
    """The only case of one length and one depth."""
    options = {"kind": "words", "mode": "single", "length": 300, "depth": 0.5} | options
    length, depth = options.pop("length"), options.pop("depth")
    (case,) = needle_cases(COUNTERS[counter], lengths=[length], depths=[depth], **options)
    return case


def sentences(case: Case) -> list[str]:
    """The document's sentences after the first, which says what it is."""
    found = re.split(r"\.\s+", case.document)
    assert found.pop() == ""
    return found[1:]


def facts(case: Case) -> dict[str, str]:
    """Thing to value, in the order of the document."""
    return {match[1]: match[2] for text in sentences(case) if (match := FACT.fullmatch(text))}


def asked(case: Case) -> list[str]:
    """The thing that each question is about."""
    matches = [re.search(r"of the (\w+)\?$", question.text) for question in case.questions]
    return [match[1] for match in matches if match]


#
# needle
#


@settings(deadline=None, max_examples=60)
@given(**grid)
def test_a_needle_document_has_the_length_asked_for(
    counter: str, kind: str, mode: str, length: int, depth: float, seed: int
) -> None:
    case = one(counter, kind=kind, mode=mode, length=length, depth=depth, seed=seed)
    assert abs(COUNTERS[counter](case.document) - length) <= 0.02 * length
    assert case.document.endswith("\n\n")


@settings(deadline=None, max_examples=60)
@given(**grid)
def test_the_fact_stands_at_its_depth_between_two_sentences(
    counter: str, kind: str, mode: str, length: int, depth: float, seed: int
) -> None:
    case = one(counter, kind=kind, mode=mode, length=length, depth=depth, seed=seed)
    texts = sentences(case)
    sizes = [0 if FACT.fullmatch(text) else len(text) + 2 for text in texts]
    longest, total = max(sizes), sum(sizes)
    matches = [FACT.fullmatch(text) for text in texts]
    places = [i for i, match in enumerate(matches) if match and match[1] in asked(case)]
    found = [sum(sizes[:place]) for place in places]
    shares = [0.5 * depth + 0.25 * turn for turn in range(3)] if mode == "multi-turn" else [depth]
    wanted = [share * total for share in shares]
    # the nearest end of a sentence; one further where another fact has taken it
    room = 1.5 if mode == "multi-turn" else 0.5
    assert len(found) == len(wanted)
    assert all(abs(a - b) <= room * longest + 1 for a, b in zip(found, wanted, strict=True))


@settings(deadline=None, max_examples=60)
@given(**grid)
def test_every_value_is_in_the_document_once_and_nowhere_else(
    counter: str, kind: str, mode: str, length: int, depth: float, seed: int
) -> None:
    case = one(counter, kind=kind, mode=mode, length=length, depth=depth, seed=seed)
    known = facts(case)
    assert len(set(known.values())) == len(known)
    for value in known.values():
        assert case.document.lower().count(value.lower()) == 1
        assert all(value.lower() not in question.text.lower() for question in case.questions)
    assert [question.expected for question in case.questions] == [(known[thing],) for thing in asked(case)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_how_many_facts_and_questions_there_are(kind: str, mode: str) -> None:
    case = one(kind=kind, mode=mode, n_keys=6, n_turns=4)
    n_facts, n_questions = {"single": (1, 1), "multi-key": (6, 1), "multi-turn": (4, 4)}[mode]
    assert len(facts(case)) == n_facts
    assert len(set(asked(case))) == len(case.questions) == n_questions
    assert all(value.isdigit() == (kind == "numbers") for value in facts(case).values())
    assert all(question.n_answer > 0 and not question.answer_prefix for question in case.questions)


@pytest.mark.parametrize(("mode", "depth"), [("single", 0), ("single", 1), ("multi-key", 0), ("multi-key", 1)])
def test_at_the_ends_nothing_but_the_header_is_before_or_after_the_fact(mode: str, depth: float) -> None:
    case = one(mode=mode, depth=depth)
    match = FACT.fullmatch(sentences(case)[-1 if depth else 0])
    assert match and match[1] in asked(case)


def test_other_facts_are_spread_over_the_whole_text() -> None:
    case = one(mode="multi-key", depth=0.5, n_keys=9, length=2000)
    places = [case.document.index(f"of the {thing} is") / len(case.document) for thing in facts(case)]
    assert min(places) < 0.2 and max(places) > 0.8
    assert max(b - a for a, b in pairwise(places)) < 0.3


def test_turns_are_asked_in_another_order_than_that_of_the_text() -> None:
    orders = {tuple(list(facts(case)).index(thing) for thing in asked(case)) for case in grid_of("multi-turn", 12)}
    assert len(orders) > 2


def grid_of(mode: str, repeats: int, seed: int = 0) -> list[Case]:
    return needle_cases(
        COUNTERS["words"], lengths=[200, 300], depths=[0, 0.5, 1], kind="words", mode=mode, repeats=repeats, seed=seed
    )


@pytest.mark.parametrize(("mode", "means"), [("single", [0, 0.5, 1]), ("multi-turn", [0.25, 0.5, 0.75])])
def test_labels_say_what_a_case_is(mode: str, means: list[float]) -> None:
    cases = grid_of(mode, 2)
    assert len({case.id for case in cases}) == len(cases) == 12
    assert {case.task for case in cases} == {f"needle-{mode}-words"}
    assert [case.labels["depth"] for case in cases[:6:2]] == means
    assert [case.labels["length"] for case in cases] == [200] * 6 + [300] * 6
    assert {(case.labels["kind"], case.labels["mode"]) for case in cases} == {("words", mode)}


def test_no_sentence_occurs_twice_even_in_a_long_document() -> None:
    texts = sentences(one(length=20_000))
    assert len(texts) > 2000
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_always_gives_the_same_cases_and_another_gives_others(mode: str) -> None:
    assert grid_of(mode, 2) == grid_of(mode, 2)
    assert not {c.document for c in grid_of(mode, 2)} & {c.document for c in grid_of(mode, 2, seed=1)}


def test_more_lengths_depths_or_repeats_leave_a_case_as_it_is() -> None:
    assert one(length=300, depth=0.5) in grid_of("single", 3)


def test_the_generator_gives_what_it_gave_before() -> None:
    """Scores of two versions can only be compared on the same text: this test is red if the text changes."""
    case = one(kind="numbers", depth=0)
    assert sentences(case)[:3] == [
        "The code of the lighthouse is 21106",
        "The ladder was hollow",
        "The doctor painted the heavy basket between the fields",
    ]


def test_names_are_no_part_of_any_other_word() -> None:
    filler = " ".join(word for words in FILLER.values() for word in words).lower()
    names = [name.lower() for name in NAMES]
    assert len(set(names)) == len(names) > 100
    assert not [name for name in names if sum(name in other for other in names) > 1]
    assert not [name for name in names if name in filler or any(name in thing for thing in THINGS)]
    assert not [thing for thing in THINGS if re.search(rf"\b{thing}\b", filler)]
    assert not re.search(r"\d|code|owner", filler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "A length is 0"),
        ({"length": 25}, "cannot be made 25 tokens long"),
        ({"length": 90, "mode": "multi-key", "n_keys": 8}, "with 8 facts cannot be made 90 tokens long"),
        ({"depth": 1.5}, "A depth is 1.5"),
        ({"depth": float("nan")}, "A depth is nan"),
        ({"kind": "letters"}, "kind is 'letters'; give one of words, numbers"),
        ({"mode": "many"}, "mode is 'many'"),
        ({"n_keys": 0}, "n_keys is 0"),
        ({"n_turns": 31}, "n_turns is 31"),
        ({"repeats": 0}, "repeats is 0"),
        ({"counter": "nothing"}, "cannot be made 300 tokens long"),
    ],
)
def test_bad_needle_arguments_are_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setitem(COUNTERS, "nothing", lambda text: 0)
    with pytest.raises(UsageError, match=re.escape(message)):
        one(**options)


#
# files
#


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def ruler_row(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "input": "Remember.\nA long text.\nWhat is it?", "outputs": ["7", "8"]} | fields


def test_a_ruler_row_is_parted_before_its_last_line(tmp_path: Path) -> None:
    write(tmp_path / "vt.jsonl", [ruler_row(3, answer_prefix="Answer:"), ruler_row(4, input="Only a question?\n")])
    first, second = ruler_cases(tmp_path)
    assert (first.id, first.task, first.document) == ("vt/3", "vt", "Remember.\nA long text.\n")
    (question,) = first.questions
    assert (question.text, question.expected, question.answer_prefix) == ("What is it?", ("7", "8"), "Answer:")
    assert (second.document, second.questions[0].text) == ("", "Only a question?")
    assert second.questions[0].answer_prefix == ""


@given(st.text(alphabet="ab .\n\u2028\r"))
def test_document_and_question_of_a_ruler_row_are_its_input(text: str) -> None:
    from kvlocal.eval.tasks.ruler import _case
    from kvlocal.jsonl import Row

    row = Row("here", 1, ruler_row(input=text))
    if not text.strip():
        with pytest.raises(UsageError, match="'input' is empty"):
            _case("niah", row)
        return
    case = _case("niah", row)
    assert case.document + case.questions[0].text == text.rstrip()
    assert "\n" not in case.questions[0].text and (case.document == "" or case.document.endswith("\n"))


def test_ruler_tasks_are_files_and_answers_as_long_as_ruler_allows(tmp_path: Path) -> None:
    sizes = {"niah_single_1": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_2": 32, "other": 128}
    for task in sizes:
        write(tmp_path / f"{task}.jsonl", [ruler_row(i) for i in range(3)])
    (tmp_path / "notes.txt").write_text("not a task")
    cases = ruler_cases(tmp_path, rows=2)
    assert [case.id for case in cases] == [f"{task}/{i}" for task in sorted(sizes) for i in range(2)]
    assert {case.task: case.questions[0].n_answer for case in cases} == sizes
    assert [case.task for case in ruler_cases(tmp_path, tasks=["vt", "cwe"])] == ["vt"] * 3 + ["cwe"] * 3


def test_ruler_counts_all_outputs_but_for_questions_with_variants_of_one_answer(tmp_path: Path) -> None:
    for task in ("qa_1", "niah_multivalue", "vt"):
        write(tmp_path / f"{task}.jsonl", [ruler_row(0)])
    any_of = {case.task: case.questions[0].any_of for case in ruler_cases(tmp_path)}
    assert any_of == {"qa_1": True, "niah_multivalue": False, "vt": False}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "task.jsonl, line 2: not JSON"),
        ("[1]", "task.jsonl, line 2: a JSON list, not an object"),
        ({"index": 1, "input": "a"}, "task.jsonl, line 2: the field 'outputs' is missing"),
        (ruler_row(1, outputs=[]), "line 2: the field 'outputs' must be a list of one or more strings"),
        (ruler_row(1, outputs=[7]), "line 2: the field 'outputs' must be"),
        (ruler_row(1, outputs=[""]), "line 2: the field 'outputs' must be"),
        (ruler_row(1, input=7), "line 2: the field 'input' must be a string"),
        (ruler_row("1"), "line 2: the field 'index' must be a whole number"),  # type: ignore[arg-type]
        (ruler_row(1, answer_prefix=None), "line 2: the field 'answer_prefix' must be a string"),
        (ruler_row(0), "line 2: the index 0 was there before"),
        (ruler_row(1, input=" \n"), "line 2: the field 'input' is empty"),
    ],
)
def test_a_fault_in_a_row_is_named_with_file_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    write(tmp_path / "task.jsonl", [ruler_row(), line])
    with pytest.raises(UsageError, match=re.escape(message)):
        ruler_cases(tmp_path)
    assert len(ruler_cases(tmp_path, rows=1)) == 1


def test_folders_and_tasks_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        ruler_cases(tmp_path / "none")
    with pytest.raises(UsageError, match=r"holds no \.jsonl file"):
        ruler_cases(tmp_path)
    write(tmp_path / "vt.jsonl", [ruler_row()])
    with pytest.raises(UsageError, match="has no task niah, qa; it has vt"):
        ruler_cases(tmp_path, tasks=["niah", "vt", "qa"])


def test_lines_end_with_line_feeds_only_and_empty_ones_are_passed_over(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    path = write(tmp_path / "a.jsonl", [json.dumps({"text": text}, ensure_ascii=False), "", '{"text": "x"}\r'])
    assert [(row.line, row["text"]) for row in read_rows(path, {"text": TEXT})] == [(1, text), (3, "x")]


def test_files_without_rows_or_in_another_encoding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        read_rows(tmp_path / "none.jsonl", {})
    with pytest.raises(UsageError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", [""]), {})
    with pytest.raises(UsageError, match="rows is -1"):
        read_rows(write(tmp_path / "a.jsonl", ["{}"]), {}, rows=-1)
    (tmp_path / "latin.jsonl").write_bytes(b'{}\n{"a": "\xe9"}\n')
    with pytest.raises(UsageError, match="line 2: not UTF-8"):
        read_rows(tmp_path / "latin.jsonl", {})


RECORDS = [[f"key-{i}", f"value-{i}"] for i in range(5)]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_key_value_records_are_one_json_object_in_their_order(tmp_path: Path, place: int) -> None:
    row = {"ordered_kv_records": RECORDS, "key": f"key-{place}", "value": f"value-{place}"}
    (case,) = kv_cases(write(tmp_path / "kv.jsonl", [row]))
    json_text = case.document[case.document.index("{") :]
    assert list(json.loads(json_text).items()) == [tuple(record) for record in RECORDS]
    assert len(json_text.strip().splitlines()) == len(RECORDS) + 2
    assert case.labels == {"depth": place / 4, "n_keys": 5}
    (question,) = case.questions
    assert f'"key-{place}"' in question.text and question.expected == (f"value-{place}",)
    assert question.n_answer == 48 and case.document.endswith("\n\n")
    assert question.answer_prefix == f'"key-{place}": "'


def test_key_value_rows_are_told_apart_and_limited(tmp_path: Path) -> None:
    rows = [{"ordered_kv_records": RECORDS, "key": k, "value": v} for k, v in RECORDS]
    path = write(tmp_path / "kv.jsonl", rows)
    assert len({case.id for case in kv_cases(path)}) == 5
    assert kv_cases(path, rows=2) == kv_cases(path)[:2]
    assert {case.task for case in kv_cases(path)} == {"kv_retrieval"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "other"}, "must hold 'key' once"),
        ({"value": "other"}, "must hold 'key' once"),
        ({"ordered_kv_records": RECORDS + RECORDS[:1]}, "must hold 'key' once"),
        ({"ordered_kv_records": [["a"]]}, "'ordered_kv_records' must be a list of one or more pairs"),
    ],
)
def test_key_value_rows_that_contradict_themselves_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    row = {"ordered_kv_records": RECORDS, "key": "key-0", "value": "value-0"} | fields
    with pytest.raises(UsageError, match=re.escape(message)):
        kv_cases(write(tmp_path / "kv.jsonl", [row]))


def test_summaries_are_known_by_their_fields(tmp_path: Path) -> None:
    news = write(tmp_path / "a.jsonl", [{"article": "A storm came. \n", "highlights": "Storm ."}] * 3)
    multi = write(tmp_path / "b.jsonl", [{"input": "", "context": "Passage 1:\nA storm.\n", "answers": ["One", "Two"]}])
    case = summary_cases(news, rows=2)[1]
    assert (case.task, case.document, case.questions[0].expected) == (
        "cnn_dailymail",
        "A storm came.\n\n",
        ("Storm .",),
    )
    assert case.questions[0].n_answer == 128 and "three sentences" in case.questions[0].text
    assert len({case.id for case in summary_cases(news)}) == 3 and len(summary_cases(news, rows=2)) == 2
    (case,) = summary_cases(multi)
    assert (case.task, case.questions[0].expected, case.questions[0].n_answer) == ("multi_news", ("One", "Two"), 256)
    assert case.document == "Passage 1:\nA storm.\n\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1: no summaries to be found; a row must have the fields 'article' and 'highlights' or"),
        ([{"article": "a", "highlights": "b"}, {"article": "a"}], "line 2: the field 'highlights' is missing"),
        ([{"article": "a", "highlights": ["b"]}], "line 1: the field 'highlights' must be a string"),
        ([{"context": "a", "answers": "b"}], "line 1: the field 'answers' must be a list"),
        ([{"article": " ", "highlights": "b"}], "line 1: 'article' and 'highlights' must not be empty"),
    ],
)
def test_rows_without_a_summary_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        summary_cases(write(tmp_path / "s.jsonl", rows))
