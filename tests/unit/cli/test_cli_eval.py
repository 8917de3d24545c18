"""`kvlocal eval` with a measurement that is made up: what is asked for, errors and exit codes, help."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import call, fail, press_ctrl_c, sentence
from fake_eval import NEEDLES, ROUGE, TEXTS, FakeEval, found
from kvlocal_cli.backend import eval as backend

from kvlocal.errors import KVError, UsageError
from kvlocal.eval import records
from kvlocal.eval.stage import StageConfig
from kvlocal.measure.variants import expand

# --- what is measured -------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_help(fake_eval: FakeEval, novel: str) -> None:
    assert call("eval", "needle").exit_code == 0
    plan = fake_eval.plan
    policies = ("streaming", "snapkv", "ada-snapkv")
    assert [v.label for v in plan.variants] == [f"{name} {share}" for name in policies for share in ("50%", "25%")]
    assert plan.config == StageConfig(n_ctx=0, parallel=16, n_ubatch=512, n_threads=0, chunk=512, evict_every=32)
    assert (plan.metric, plan.questions, plan.cases) == ("needle", ("inside", "after"), ())
    assert plan.source == {
        "lengths": (1024, 2048),
        "depths": (0.0, 0.25, 0.5, 0.75, 1.0),
        "kind": "numbers",
        "mode": "single",
        "repeats": 1,
        "seed": 0,
    }
    assert (fake_eval.n_gpu_layers, fake_eval.fresh) == (0, False)
    fake_eval.records = TEXTS
    for name, expected in (("kld", (3072, 256, 3)), ("ppl", (1024, 1024, 1))):
        assert call("eval", name, "--text", novel).exit_code == 0
        assert tuple(fake_eval.plan.source.values()) == ((Path(novel),), *expected) and not fake_eval.plan.questions


def test_every_option_arrives(fake_eval: FakeEval) -> None:
    line = (
        "eval needle my.gguf --lengths 64,96 --depths 0.5 --kind numbers --mode multi-turn --repeats 2 --seed 5"
        " --ask after --policy paged,snapkv --policy-arg window=8 --budget 10,25% --kv f16 --prefill exact,chunked"
        " --chunk 32 --guide 0,16 --evict-every 4 --parallel 3 -c 999 -t 3 -ngl 99 --kernels portable -ub 64 -b 48"
        " --fresh"
    )
    assert call(*line.split()).exit_code == 0
    plan = fake_eval.plan
    assert (fake_eval.model, fake_eval.n_gpu_layers, fake_eval.fresh) == ("my.gguf", 99, True)
    modes = ["", " chunked", " chunked guide 16"]
    assert [v.label for v in plan.variants] == [
        "paged",
        *(f"snapkv {b}{mode}" for b in ("10", "25%") for mode in modes),
    ]
    assert {v.policy.n_window for v in plan.variants[1:]} == {8}
    # llama.cpp has no physical batch above the logical one
    assert plan.config == StageConfig(
        n_ctx=999, parallel=3, n_ubatch=48, n_threads=3, kernels="portable", chunk=32, evict_every=4
    )
    assert tuple(plan.source.values()) == ((64, 96), (0.5,), "numbers", "multi-turn", 2, 5)
    assert plan.questions == ("after",)


def test_cases_are_read_from_files_before_the_model(fake_eval: FakeEval, tmp_path: Path) -> None:
    (tmp_path / "vt.jsonl").write_text(2 * '{"index": 0, "input": "Facts.\\nWhich?", "outputs": ["a"]}\n')
    (tmp_path / "qa.jsonl").write_text('{"index": 0, "input": "Facts.\\nWho?", "outputs": ["b"]}\n' * 2)
    args = ["eval", "ruler", "--data-dir", str(tmp_path)]
    assert sentence(*args).endswith("qa.jsonl, line 2: the index 0 was there before; give every row its own.")
    assert not fake_eval.log
    assert call(*args, "--rows", "1").exit_code == 0
    assert [case.id for case in fake_eval.plan.cases] == ["qa/0", "vt/0"]
    assert call(*args, "--rows", "1", "--tasks", "vt").exit_code == 0
    assert [case.id for case in fake_eval.plan.cases] == ["vt/0"]

    file = tmp_path / "keys.jsonl"
    file.write_text('{"ordered_kv_records": [["k", "v"]], "key": "k", "value": "v"}\n')
    assert call("eval", "kv-retrieval", "--data", str(file)).exit_code == 0
    assert [case.id for case in fake_eval.plan.cases] == ["kv_retrieval/1"] and len(fake_eval.plan.questions) == 2

    fake_eval.records = [found("snapkv", ROUGE, metric="summarize")]
    file.write_text('{"article": "It rained.", "highlights": "Rain."}\n' * 3)
    assert call("eval", "summarize", "--data", str(file), "--rows", "2").exit_code == 0
    assert len(fake_eval.plan.cases) == 2 and fake_eval.plan.questions == ("inside",)


def test_the_context_has_room_for_the_longest_case_and_a_guide_past_its_end() -> None:
    def n_ctx(given: int, *guides: int) -> int:
        variants = expand(["paged", "snapkv"], {}, ["25%"], prefills=["chunked"], guides=guides)
        plan = backend.EvalPlan("needle", {}, (), variants, ("inside",), StageConfig(n_ctx=given))
        return backend._n_ctx(plan, 1000, "the case niah/7")

    assert (n_ctx(0, 0), n_ctx(0, 0, 200)) == (1088, 1280)
    assert (n_ctx(1001, 0), n_ctx(1201, 200)) == (1001, 1201)
    for guide in (0, 200):
        with pytest.raises(UsageError, match=f"the case niah/7 needs a context of {1001 + guide} tokens, --ctx-size "):
            n_ctx(1000 + guide, guide)


@pytest.mark.parametrize(
    ("args", "copied"),
    [("", True), ("--as-is", False), ("m.gguf", False), ("m.gguf --f32", True), ("-hf some/one", False)],
)
def test_weights_are_f32_for_the_default_model_or_when_asked(fake_eval: FakeEval, args: str, copied: bool) -> None:
    result = call("eval", "needle", *args.split())
    assert ("F32 weights" in result.stdout) == copied
    assert fake_eval.log == ["find", *(["copy"] if copied else []), "open", "close"]
    assert fake_eval.path == Path("found.f32" if copied else "found.gguf")


# --- errors and exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("needle --lengths 0", "Invalid value for '--lengths': '0' is not a length: it must be at least 1 token;"),
        ("needle --lengths 64,x", "Invalid value for '--lengths': 'x' is not a whole number of at least 0;"),
        ("needle --depths 0,1.5", "Invalid value for '--depths': '1.5' is not a number from 0 to 1;"),
        ("needle --depths nan", "Invalid value for '--depths': 'nan' is not a number from 0 to 1;"),
        ("needle --depths 0,,1", "Invalid value for '--depths': '0,,1' is not a list: an item is empty;"),
        ("needle --mode many", "Invalid value for '--mode': 'many' is not one of "),
        ("needle --ask never", "Invalid value for '--ask': 'never' is not one of 'inside', 'after', 'both';"),
        ("needle --repeats 0", "Invalid value for '--repeats': 0 is not in the range x>=1;"),
        ("needle --parallel 256", "Invalid value for '--parallel': 256 is not in the range 1<=x<=255;"),
        ("needle --policy snapky", "There is no policy 'snapky' (did you mean 'snapkv'?); known policies: "),
        ("needle --policy-arg nothing=1", "None of the policies streaming, snapkv, ada-snapkv has a parameter "),
        ("needle --budget 25%,8", "A budget of 8 tokens per head is too small: the policy needs at least "),
        ("needle --kv q5", "There is no storage 'q5' for the KV cache; give f16, q8, q4, "),
        ("needle --kernels none", "Invalid value for '--kernels': 'none' is not one of 'auto', 'portable';"),
        ("needle --policy ladder --kernels portable", "Policy ladder stores tokens in formats other than f16, for "),
        ("needle --policy snapkv,h2o --kernels portable", "Policy h2o accumulates the attention that every token "),
        ("needle --policy paged --kv q4 --kernels portable", "--kv q4 stores tokens in formats other than f16, for "),
        ("needle --chunk 64", "--chunk has no effect without --prefill chunked; give both or neither."),
        ("needle --guide 0,64", "--guide has no effect without --prefill chunked; give both or neither."),
        ("needle --plot needle.pdf", "A plot is written as .svg or .png, not as 'needle.pdf'."),
        ("needle --plot no/such/needle.svg", "there is no folder 'no/such' to write 'needle.svg' to."),
        ("needle --output-file .", "'.' is a folder; name a file."),
        ("needle m.gguf -hf some/one", "two models are named, MODEL 'm.gguf' and -hf 'some/one'; give one of them."),
        ("kld", "Missing option '--text';"),
        ("kld --text no.txt", "Invalid value for '--text': File 'no.txt' does not exist;"),
        ("ppl --text . ", "Invalid value for '--text': File '.' is a directory;"),
        ("ruler", "Missing option '--data-dir';"),
        ("ruler --data-dir no", "Invalid value for '--data-dir': Directory 'no' does not exist;"),
        ("summarize --data no.jsonl", "Invalid value for '--data': File 'no.jsonl' does not exist;"),
        ("sing", "No such command 'sing'; see `kvlocal eval --help`."),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(fake_eval: FakeEval, args: str, expected: str) -> None:
    assert sentence("eval", *args.split()).startswith(expected)
    assert not fake_eval.log


def test_texts_of_the_same_name_and_batches_of_one_token_are_refused(
    fake_eval: FakeEval, novel: str, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "novel.md"
    other.write_text("It was.")
    assert sentence("eval", "kld", "--text", novel, "--text", str(other)) == (
        "two texts are named 'novel', by which results are listed; rename one of them."
    )
    assert sentence("eval", "kld", "--text", novel, "-ub", "1") == (
        "the noise floor needs batches of two sizes; give -b and -ub of at least 2."
    )
    assert "x>=2" in sentence("eval", "ppl", "--text", novel, "--continue", "1")
    assert not fake_eval.log


def test_a_missing_rouge_is_noticed_before_the_model_is_loaded(
    fake_eval: FakeEval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlocal.eval import scores

    monkeypatch.setattr(scores, "rouge", lambda _answer, _expected: fail(KVError("ROUGE needs rouge-score."))())
    (tmp_path / "news.jsonl").write_text('{"article": "It rained.", "highlights": "Rain."}\n')
    args = ["eval", "summarize", "--data", str(tmp_path / "news.jsonl")]
    assert sentence(*args, code=1) == "ROUGE needs rouge-score."
    assert not fake_eval.log


@pytest.mark.parametrize("fault", [press_ctrl_c, fail(KeyboardInterrupt())])
def test_ctrl_c_shows_what_was_measured(fake_eval: FakeEval, fault: Callable[[], None], tmp_path: Path) -> None:
    fake_eval.fault, fake_eval.fault_at = fault, 3
    result = call("eval", "needle", "-o", "json", "--plot", str(tmp_path / "needle.svg"))
    assert (result.exit_code, result.stderr) == (130, "")
    assert json.loads(result.stdout)["results"] == records.rows(NEEDLES[:3])
    assert (tmp_path / "needle.svg").exists() and fake_eval.log[-1] == "close"


def test_ctrl_c_before_the_first_record_prints_nothing(fake_eval: FakeEval) -> None:
    fake_eval.fault, fake_eval.fault_at = press_ctrl_c, 0
    result = call("eval", "needle")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_a_failure_keeps_what_was_measured(fake_eval: FakeEval) -> None:
    fake_eval.fault = fail(KVError("no memory for the case niah/7."))
    result = call("eval", "needle", "-o", "csv")
    assert (result.exit_code, result.stderr) == (1, "Error: no memory for the case niah/7.\n")
    assert result.stdout.count("\n") == 2


def test_without_matplotlib_the_error_says_how_to_get_it(fake_eval: FakeEval, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "needs matplotlib" in sentence("eval", "needle", "--plot", "needle.svg", code=1)
    assert not fake_eval.log


# --- help -------------------------------------------------------------------------------------------------------

NAMES = ("kld", "ppl", "needle", "ruler", "summarize", "kv-retrieval")


def test_the_overview_has_every_evaluation_in_full() -> None:
    lines = call("eval", "--help").stdout.splitlines()
    for name in NAMES:
        line = next(line for line in lines if line.startswith(f"  {name} "))
        assert line.endswith(".") and not line.endswith("...")
    assert any(line.startswith("  eval ") and not line.endswith("...") for line in call("--help").stdout.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_help_groups_the_options_and_shows_an_example(name: str) -> None:
    text = call("eval", name, "--help").stdout
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Cases:", "KV cache:", "Model:", "Output:", "Options:"]
    assert f"\n  kvlocal eval {name} " in text
    assert "without either, F32 for the default model" in " ".join(text.split())
