"""Evaluations on the tiny model: the same answers as one at a time, distances that mean what they say, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from needles import FACTS, GREEDY, OpenEngine, document

from kvlocal.errors import UsageError
from kvlocal.eval import texts as text
from kvlocal.eval.cases import Case, Question
from kvlocal.eval.questions import Ask, turns
from kvlocal.eval.records import Record, Store, rows
from kvlocal.eval.scores import contains
from kvlocal.eval.stage import Stage, StageConfig
from kvlocal.eval.texts import Distribution, Kld, Ppl, excerpts
from kvlocal.measure.variants import Variant, expand
from kvlocal.native.model import Model

CONFIG = StageConfig(n_ctx=1024, parallel=3, n_ubatch=128, n_threads=1, chunk=128)
N_ANSWER = 16


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model(tiny_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "records.jsonl")


def case(i: int, *later: int) -> Case:
    facts = [FACTS[j] for j in (i, *later)]
    questions = tuple(Question(fact.question, (fact.value,), N_ANSWER) for fact in facts)
    return Case(f"fact/{i}", "facts", document(*facts) + "\n\n", questions)


def ask(model: Model, store: Store, cases: list[Case], variants: tuple[Variant, ...], *modes: str) -> list[Record]:
    return list(Ask(model, "needle", cases, contains, variants, modes, CONFIG, store).run())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefills": ["chunked"]},
        {"prefills": ["chunked"], "guides": [24]},
    ],
)
def test_answers_are_those_of_an_engine_that_runs_alone(
    settings: dict[str, list], model: Model, store: Store, open_engine: OpenEngine
) -> None:
    """Branches that are decoded together, in several groups and rounds, each say what their policy alone says."""
    names = ["full", "paged", "snapkv", "ada-snapkv", "buzz", "corm", "tova", "streaming"]
    variants = expand(names, {}, ["50%", "200"], **settings)
    found = ask(model, store, [case(3)], variants, "inside")
    assert len(found) == len(variants) == 14
    for variant, record in zip(variants, found, strict=True):
        name = "streaming" if variant.name == "paged" else variant.name
        budget = str(variant.budget) if variant.policy.evicts else "100%"
        engine = open_engine(name, budget, n_ctx=1024, prefill=variant.prefill, chunk=128, guide=variant.guide)
        tokens = turns(model, case(3))
        engine.prefill(tokens.document + tokens.questions[0])
        answer = "".join(engine.generate(N_ANSWER, GREEDY))
        assert record.answer == answer, variant.label


def test_a_question_that_comes_after_the_eviction_finds_less(model: Model, store: Store) -> None:
    cases = [case(i) for i in range(0, 12, 2)]
    variants = expand(["paged", "snapkv"], {"window": "8"}, ["40"])
    table = {(r["policy"], r["question"]): r for r in rows(ask(model, store, cases, variants, "inside", "after"))}
    assert table["paged", "inside"]["score"] == table["paged", "after"]["score"] == 1
    assert table["snapkv", "inside"]["score"] >= table["snapkv", "after"]["score"] + 0.5
    assert table["snapkv", "after"]["n"] == 6 and table["snapkv", "after"]["held"] < 0.25


def test_later_questions_are_turns_of_the_same_conversation(model: Model, store: Store) -> None:
    (record,) = ask(model, store, [case(0, 3, 6)], expand(["paged"], {}, []), "inside")
    answers = record.answer.split("\n")
    assert len(answers) == 3
    assert record.measures["score_first"] == 1
    assert record.measures["score"] == pytest.approx((1 + 2 * record.measures["score_later"]) / 3)


def test_a_case_that_does_not_fit_is_refused_with_its_name(model: Model, store: Store) -> None:
    long = Case("long/1", "facts", document(before=200), (Question("?", ("x",), 8),))
    with pytest.raises(UsageError, match="long/1 needs .* 1023; use a larger context"):
        ask(model, store, [long], expand(["paged"], {}, []), "inside")


#
# texts
#


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(document(*FACTS, before=9, after=20))
    return path


TEXT_NAMES = ["paged", "full", "random", "streaming", "snapkv", "corm"]


def test_kl_is_a_distance_from_the_full_cache(model: Model, store: Store, book: Path) -> None:
    found = excerpts(model, [book], 256, 64, 2)
    assert len({e.id for e in found}) == 2 and all(len(e.tokens) == 320 for e in found)
    table = {
        (r["policy"], r["budget"]): r
        for r in rows(Kld(model, found, expand(TEXT_NAMES, {}, ["80%", "20%"]), CONFIG, store).run())
    }
    assert table["paged", "100%"]["kl"] == 0 and table["paged", "100%"]["ppl_ratio"] == 1
    assert table["full", "100%"]["kl"] < 0.01 and table["full", "100%"]["top1"] > 0.95
    for name in ("random", "streaming", "snapkv", "corm"):
        assert table[name, "20%"]["kl"] > table[name, "80%"]["kl"] > 0
        assert table[name, "20%"]["held"] == pytest.approx(0.2, abs=0.01)
        assert table[name, "20%"]["floor"] < table[name, "20%"]["kl"] / 10
        assert table[name, "20%"]["ci_low"] <= table[name, "20%"]["kl"] <= table[name, "20%"]["ci_high"]


def test_divergence_agreement_and_likelihood_by_hand() -> None:
    p = Distribution.of(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]) + 3)
    q = Distribution.of(np.log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]) - 1)
    assert p.kl(q) == pytest.approx(0.5 * (0.5 * np.log(2) + 0.25 * np.log(0.5)))
    assert p.kl(p) == 0 and p.top1(q) == 0.5
    assert p.nll(np.array([1, 1])) == pytest.approx(-(np.log(0.25) + np.log(0.8)) / 2)


def test_perplexity_of_a_continuation_that_is_evicted_on_the_way(model: Model, store: Store, book: Path) -> None:
    found = excerpts(model, [book], 128, 320, 1)
    variants = expand(TEXT_NAMES, {}, ["100%", "48"])
    table = {(r["policy"], r["budget"]): r for r in rows(Ppl(model, found, variants, CONFIG, store).run())}
    assert table["paged", "100%"]["ppl_ratio"] == 1
    assert table["full", "100%"]["ppl_ratio"] == pytest.approx(1, abs=0.01)
    assert table["paged", "100%"]["held"] == pytest.approx(1) == table["full", "100%"]["held"]
    for name in ("random", "streaming", "snapkv", "corm"):
        assert table[name, "100%"]["ppl_ratio"] == pytest.approx(1, abs=1e-3), "nothing was evicted"
        assert 48 <= table[name, "48"]["held_tokens"] < 48 + CONFIG.evict_every
        assert table[name, "48"]["ppl_ratio"] > 1.001
    assert table["streaming", "48"]["ppl_ratio"] < table["random", "48"]["ppl_ratio"]


def test_excerpts_begin_alike_and_are_refused_if_the_text_is_short(model: Model, book: Path) -> None:
    bos = model.tokenize("")
    found = excerpts(model, [book], 64, 16, 3)
    assert len(bos) == 1 and all(list(e.tokens[:1]) == bos for e in found)
    assert len({e.tokens[1:20] for e in found}) == 3
    with pytest.raises(UsageError, match=r"book.txt has \d+ tokens; --context 5000 and --continue 16 need 5015"):
        excerpts(model, [book], 5000, 16, 3)


#
# records
#


@pytest.mark.parametrize("kind", ["ask", "kld", "ppl"])
def test_what_is_on_record_is_not_measured_again(
    kind: str, model: Model, tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on where it stopped; another policy on the same cases measures only itself."""
    path = tmp_path / "store.jsonl"
    count: list[str] = []
    branch = Stage.branch

    def counted(stage: Stage, seq: int, variant: Variant) -> object:
        if len(count) == stop:
            raise KeyboardInterrupt
        count.append(variant.label)
        return branch(stage, seq, variant)

    monkeypatch.setattr(Stage, "branch", counted)

    def run(*names: str) -> list[Record]:
        variants = expand(names, {}, ["50%"])
        found = excerpts(model, [book], 128, 32, 2)
        runs: dict[str, Callable[[Store], list[Record]]] = {
            "ask": lambda store: ask(model, store, [case(0), case(3)], variants, "inside"),
            "kld": lambda store: list(Kld(model, found, variants, CONFIG, store).run()),
            "ppl": lambda store: list(Ppl(model, found, variants, CONFIG, store).run()),
        }
        store = Store(path)
        try:
            return runs[kind](store)
        finally:
            store.close()

    stop = 6
    with pytest.raises(KeyboardInterrupt):
        run("random", "streaming", "snapkv", "tova")
    assert path.read_text().strip(), "nothing was kept"
    stop, n_before = 999, len(count)
    first = run("random", "streaming", "snapkv", "tova")
    assert len(first) == 8 and len(count) - n_before < {"ask": 8, "kld": 18, "ppl": 10}[kind]
    count.clear()
    assert run("random", "streaming", "snapkv", "tova") == first and not count
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    assert len(run("random", "knorm")) == 4
    assert set(count) <= {"knorm 50%", "paged"}
    assert text.FLOOR_SPLIT < 1
