"""`kvlocal eval` with a measurement that is made up: tables, files, errors and exit codes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_engine import call, fail, press_ctrl_c, sentence
from kvlocal_cli.backend import eval as backend
from kvlocal_cli.backend import machine as backend_machine
from kvlocal_cli.render import eval as eval_output
from kvlocal_cli.render import screen as render
from kvlocal_cli.render.eval import case_text
from kvlocal_cli.render.screen import Screen
from rich.console import Console

from kvlocal.errors import KVError, UsageError
from kvlocal.eval import records
from kvlocal.eval.evaluation import Step
from kvlocal.eval.records import Record
from kvlocal.eval.stage import StageConfig
from kvlocal.measure.variants import expand

MIB = 2**20
MACHINE = {"cpu": "Fast Chip 9", "cores": 4, "threads": 1, "read_bytes_per_s": 12.34e9}
ROUGE = {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375, "score": 0.375}
KLD = {"kl": 0.25, "floor": 1.5e-5, "top1": 0.875, "ppl": 20.0, "ppl_ratio": 1.5}


def found(
    policy: str, measures: dict[str, float], *, metric: str = "needle", case: int = 0, question: str = "", **fields: Any
) -> Record:
    """A record of a case: a quarter is held, or everything."""
    whole = policy in ("full", "paged")
    values: dict[str, Any] = {
        "task": f"{metric}-task",
        "policy_args": {} if whole else {"window": 8},
        "storage": "f16",
        "budget": "100%" if whole else "25%",
        "prefill": "exact",
        "guide": 0,
        "held_mean": 400.0 if whole else 100.0,
        "used_bytes": 4 * MIB if whole else MIB,
        "full_bytes": 4 * MIB,
        "evict_s": 0.0 if whole else 0.5,
        "labels": {"length": 400, "depth": 0.5},
    }
    return Record(metric, case=f"case/{case}", policy=policy, question=question, measures=measures, **values | fields)


TEXTS = [
    found("paged", KLD | {"kl": 0.0, "floor": 0.0, "top1": 1.0, "ppl_ratio": 1.0}, metric="kld"),
    found("snapkv", KLD, metric="kld"),
    found("snapkv", KLD | {"kl": 0.5, "top1": 0.625, "ppl_ratio": 1.0}, metric="kld", case=1),
]
NEEDLES = [
    found(policy, {"score": score}, case=case, question=question)
    for policy, question, scores in (
        ("paged", "inside", (1.0, 1.0)),
        ("snapkv", "inside", (1.0, 1.0)),
        ("paged", "after", (1.0, 1.0)),
        ("snapkv", "after", (0.5, 0.5)),
    )
    for case, score in enumerate(scores)
]


@dataclass
class Fake:
    """What was asked for, and what comes of it: `fault` runs before the record with this number."""

    records: Sequence[Record] = field(default_factory=lambda: NEEDLES)
    fault: Callable[[], None] | None = None
    fault_at: int = 1
    model: str | None = None
    path: Path | None = None
    plan: Any = None
    n_gpu_layers: int = -1
    fresh: bool = False
    log: list[str] = field(default_factory=list)

    def find_model(self, settings: Any, random: str | None, _screen: Any) -> Path:
        assert random is None
        self.model = settings.model
        self.log.append("find")
        return Path("found.gguf")

    def f32_model(self, path: Path, _screen: Any) -> Path:
        self.log.append("copy")
        return path.with_suffix(".f32")

    @contextmanager
    def open_eval(
        self, path: Path, plan: Any, n_gpu_layers: int, fresh: bool, _screen: Any
    ) -> Iterator[backend.Evaluation]:
        self.path, self.plan, self.n_gpu_layers, self.fresh = path, plan, n_gpu_layers, fresh
        self.log.append("open")
        try:
            yield backend.Evaluation("tiny", self.run)
        finally:
            self.log.append("close")

    def run(self, on_step: Any) -> Iterator[Record]:
        for i, record in enumerate(self.records):
            if self.fault is not None and i == self.fault_at:
                self.fault()
            on_step(Step(i, len(self.records), record.case))
            yield record


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(backend_machine, "find_model", fake.find_model)
    monkeypatch.setattr(backend, "f32_model", fake.f32_model)
    monkeypatch.setattr(backend, "open_eval", fake.open_eval)
    monkeypatch.setattr(backend_machine, "describe_machine", lambda _n_threads: MACHINE)
    return fake


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "novel.txt").write_text("It was a dark night.")
    return str(tmp_path / "novel.txt")


# --- what is printed --------------------------------------------------------------------------------------------


def test_a_table_of_divergences_has_intervals_and_floors(fake: Fake, text: str) -> None:
    fake.records = TEXTS
    result = call("eval", "kld", "--text", text)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "tiny · F32 weights · kld · kld-task\n"
        "\n"
        "| policy | budget |   held |                      KL |   floor |  top-1 | ppl ratio |   n |\n"
        "| ------ | ------ | -----: | ----------------------: | ------: | -----: | --------: | --: |\n"
        "| paged  | 100%   | 100.0% |                0 [0, 0] |       0 | 100.0% |     1.000 |   1 |\n"
        "| snapkv | 25%    |  25.0% | 0.3750 [0.2500, 0.5000] | 1.5e-05 |  75.0% |     1.250 |   2 |\n"
        "\n"
        "KL: nats, against the same cache with nothing evicted. floor: the same variant once more in other batches;"
        " a difference below it is not a result. top-1: how often the likeliest token is the same."
        " held: share of a full f16 cache. [ ]: 95 % bootstrap interval over cases, too narrow for fewer than 20.\n"
    )


def test_a_table_of_scores_tells_the_questions_apart(fake: Fake) -> None:
    result = call("eval", "needle", "m.gguf")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "tiny · needle · needle-task\n"
        "\n"
        "| policy | budget | question |   held |             score |   n |\n"
        "| ------ | ------ | -------- | -----: | ----------------: | --: |\n"
        "| paged  | 100%   | inside   | 100.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| snapkv | 25%    | inside   |  25.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| paged  | 100%   | after    | 100.0% | 1.00 [1.00, 1.00] |   2 |\n"
        "| snapkv | 25%    | after    |  25.0% | 0.50 [0.50, 0.50] |   2 |\n"
        "\n"
        "score: share of what was expected that the answer holds, 0 to 1. question: inside, the eviction saw it;"
        " after, it saw only the document. held: share of a full f16 cache."
        " [ ]: 95 % bootstrap interval over cases, too narrow for fewer than 20.\n"
    )


def printed(fake: Fake, *found: Record, metric: str = "needle", args: Sequence[str] = ()) -> tuple[str, list[str], str]:
    """Heading, titles of the columns and note of a table."""
    fake.records = found
    heading, _, titles, *_, note = call("eval", metric, *args).stdout.splitlines()
    return heading, [cell.strip() for cell in titles.strip("|").split("|")], note


def test_columns_that_say_the_same_everywhere_go_into_the_heading(fake: Fake) -> None:
    chunked = found("snapkv", {"score": 1.0}, question="inside", prefill="chunked", guide=64)
    heading, titles, _ = printed(fake, chunked)
    assert heading == "tiny · F32 weights · needle · needle-task · chunked prefill · guide 64 · question inside"
    assert titles == ["policy", "budget", "held", "score", "n"]
    exact = found("snapkv", {"score": 1.0}, question="after", task="other", storage="q8")
    heading, titles, _ = printed(fake, chunked, exact)
    assert heading == "tiny · F32 weights · needle"
    assert titles == ["task", "policy", "kv", "budget", "prefill", "guide", "question", "held", "score", "n"]


def test_every_metric_has_its_own_columns_and_note(fake: Fake, text: str, tmp_path: Path) -> None:
    ppl = found("snapkv", {"ppl": 20.0, "ppl_ratio": 1.5}, metric="ppl")
    _, titles, note = printed(fake, ppl, metric="ppl", args=["--text", text])
    assert titles[2:] == ["held", "ppl", "ratio", "n"]
    assert note.startswith("ratio: perplexity over that of ") and "held: mean share " in note

    file = tmp_path / "news.jsonl"
    file.write_text('{"article": "It rained.", "highlights": "Rain."}\n')
    args = ["--data", str(file)]
    _, titles, note = printed(fake, found("snapkv", ROUGE, metric="summarize"), metric="summarize", args=args)
    assert titles[2:] == ["held", "ROUGE-1", "ROUGE-2", "ROUGE-L", "n"]
    assert "0.500 |   0.250 | 0.375 [0.375, 0.375]" in call("eval", "summarize", *args).stdout

    turns = found("snapkv", {"score": 0.5, "score_first": 1.0, "score_later": 0.25})
    _, titles, note = printed(fake, turns)
    assert titles[2:] == ["held", "score", "first", "later", "n"] and "first: the first question; later: " in note


def test_the_note_says_what_the_table_lacks(fake: Fake) -> None:
    few = found("snapkv", {"score": 1.0})
    assert printed(fake, few)[2].endswith("shows the score when nothing is evicted.")
    assert "paged" not in printed(fake, few, found("paged", {"score": 1.0}))[2]
    assert "too narrow" in printed(fake, few)[2]
    many = [found("snapkv", {"score": 1.0}, case=i) for i in range(20)]
    assert "too narrow" not in printed(fake, *many)[2]
    assert "after" not in printed(fake, few)[2]


def test_json_is_what_was_measured_how_and_where(fake: Fake, text: str) -> None:
    fake.records = TEXTS
    result = call("eval", "kld", "m.gguf", "--text", text, "--contexts", "2", "-ub", "128", "-o", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert list(shown) == ["metric", "model", "settings", "machine", "results"]
    assert (shown["metric"], shown["model"], shown["machine"]) == ("kld", "tiny", MACHINE)
    assert shown["settings"] == {
        "f32": False,
        "chunk": 512,
        "evict_every": 32,
        "n_ubatch": 128,
        "n_gpu_layers": 0,
        "parallel": 16,
        "texts": [text],
        "n_context": 3072,
        "n_continue": 256,
        "per_text": 2,
    }
    assert shown["results"] == records.rows(TEXTS)
    shown = json.loads(call("eval", "needle", "--lengths", "64", "--ask", "after", "-o", "json").stdout)
    assert shown["settings"]["questions"] == ["after"] and shown["settings"]["lengths"] == [64]


def test_csv_has_a_line_per_row_and_parameters_as_json(fake: Fake) -> None:
    text = call("eval", "needle", "-o", "csv").stdout
    assert text.splitlines()[:3] == [
        "metric,task,policy,policy_args,storage,budget,prefill,guide,question,held_tokens,used_bytes,full_bytes,held,"
        "evict_s,score,ci_low,ci_high,n,commit",
        "needle,needle-task,paged,{},f16,100%,exact,0,inside,400.0,4194304.0,4194304.0,1.0,0.0,1.0,1.0,1.0,2,",
        'needle,needle-task,snapkv,"{""window"": 8}",f16,25%,exact,0,inside,100.0,1048576.0,4194304.0,0.25,0.5,1.0,1.0,'
        "1.0,2,",
    ]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 4 and json.loads(rows[1]["policy_args"]) == {"window": 8} and "\r" not in text


def test_output_goes_into_a_file_when_one_is_named(fake: Fake, tmp_path: Path) -> None:
    expected = call("eval", "needle").stdout
    result = call("eval", "needle", "--output-file", str(tmp_path / "needle.md"))
    assert (result.stdout, result.stderr) == ("", "")
    assert (tmp_path / "needle.md").read_text("utf-8") == expected


def test_the_table_of_a_terminal_has_the_same_cells() -> None:
    about = {"metric": "needle", "model": "tiny [1B]", "settings": {"f32": True}}
    text = io.StringIO()
    Console(file=text, width=120).print(*eval_output.as_rich(about, records.rows(NEEDLES), 120), sep="\n")
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[0] == "tiny [1B] · F32 weights · needle · needle-task"
    assert lines[2] == "policy budget question held score n"
    assert lines[7] == "snapkv 25% after 25.0% 0.50 [0.50, 0.50] 2"
    assert " ".join(lines[9:]).startswith("score: share of what was expected")


def test_a_terminal_gets_the_drawn_table(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(render, "out", lambda *parts: drawn.extend(parts))
    monkeypatch.setattr("kvlocal_cli.commands.eval._on_terminal", lambda: True)
    assert call("eval", "needle").stdout == "" and len(drawn) == 5
    assert call("eval", "needle", "-o", "json").stdout.startswith("{") and len(drawn) == 5


def test_progress_is_drawn_on_a_terminal_only() -> None:
    screen, text = Screen(), io.StringIO()
    screen.console = Console(file=text, force_terminal=True, width=80, color_system=None)
    with screen.progress(case_text) as show:
        show(Step(3, 1200, "niah/[2]"))
    assert "3/1,200 · niah/[2]" in text.getvalue()
    screen.console = Console(file=(quiet := io.StringIO()), force_terminal=False)
    with screen.progress(case_text) as show:
        show(Step(3, 12, "niah/2"))
    assert quiet.getvalue() == ""
    assert case_text(Step(12, 12, "")) == "12/12"


# --- what is measured -------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_help(fake: Fake, text: str) -> None:
    assert call("eval", "needle").exit_code == 0
    plan = fake.plan
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
    assert (fake.n_gpu_layers, fake.fresh) == (0, False)
    fake.records = TEXTS
    for name, expected in (("kld", (3072, 256, 3)), ("ppl", (1024, 1024, 1))):
        assert call("eval", name, "--text", text).exit_code == 0
        assert tuple(fake.plan.source.values()) == ((Path(text),), *expected) and not fake.plan.questions


def test_every_option_arrives(fake: Fake) -> None:
    line = (
        "eval needle my.gguf --lengths 64,96 --depths 0.5 --kind numbers --mode multi-turn --repeats 2 --seed 5"
        " --ask after --policy paged,snapkv --policy-arg window=8 --budget 10,25% --kv f16 --prefill exact,chunked"
        " --chunk 32 --guide 0,16 --evict-every 4 --parallel 3 -c 999 -t 3 -ngl 99 -ub 64 -b 48 --fresh"
    )
    assert call(*line.split()).exit_code == 0
    plan = fake.plan
    assert (fake.model, fake.n_gpu_layers, fake.fresh) == ("my.gguf", 99, True)
    modes = ["", " chunked", " chunked guide 16"]
    assert [v.label for v in plan.variants] == [
        "paged",
        *(f"snapkv {b}{mode}" for b in ("10", "25%") for mode in modes),
    ]
    assert {v.policy.n_window for v in plan.variants[1:]} == {8}
    # llama.cpp has no physical batch above the logical one
    assert plan.config == StageConfig(n_ctx=999, parallel=3, n_ubatch=48, n_threads=3, chunk=32, evict_every=4)
    assert tuple(plan.source.values()) == ((64, 96), (0.5,), "numbers", "multi-turn", 2, 5)
    assert plan.questions == ("after",)


def test_cases_are_read_from_files_before_the_model(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "vt.jsonl").write_text(2 * '{"index": 0, "input": "Facts.\\nWhich?", "outputs": ["a"]}\n')
    (tmp_path / "qa.jsonl").write_text('{"index": 0, "input": "Facts.\\nWho?", "outputs": ["b"]}\n' * 2)
    args = ["eval", "ruler", "--data-dir", str(tmp_path)]
    assert sentence(*args).endswith("qa.jsonl, line 2: the index 0 was there before; give every row its own.")
    assert not fake.log
    assert call(*args, "--rows", "1").exit_code == 0
    assert [case.id for case in fake.plan.cases] == ["qa/0", "vt/0"]
    assert call(*args, "--rows", "1", "--tasks", "vt").exit_code == 0
    assert [case.id for case in fake.plan.cases] == ["vt/0"]

    file = tmp_path / "keys.jsonl"
    file.write_text('{"ordered_kv_records": [["k", "v"]], "key": "k", "value": "v"}\n')
    assert call("eval", "kv-retrieval", "--data", str(file)).exit_code == 0
    assert [case.id for case in fake.plan.cases] == ["kv_retrieval/1"] and len(fake.plan.questions) == 2

    fake.records = [found("snapkv", ROUGE, metric="summarize")]
    file.write_text('{"article": "It rained.", "highlights": "Rain."}\n' * 3)
    assert call("eval", "summarize", "--data", str(file), "--rows", "2").exit_code == 0
    assert len(fake.plan.cases) == 2 and fake.plan.questions == ("inside",)


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
def test_weights_are_f32_for_the_default_model_or_when_asked(fake: Fake, args: str, copied: bool) -> None:
    result = call("eval", "needle", *args.split())
    assert ("F32 weights" in result.stdout) == copied
    assert fake.log == ["find", *(["copy"] if copied else []), "open", "close"]
    assert fake.path == Path("found.f32" if copied else "found.gguf")


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
def test_usage_errors_come_before_anything_is_loaded(fake: Fake, args: str, expected: str) -> None:
    assert sentence("eval", *args.split()).startswith(expected)
    assert not fake.log


def test_texts_of_the_same_name_and_batches_of_one_token_are_refused(fake: Fake, text: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "novel.md"
    other.write_text("It was.")
    assert sentence("eval", "kld", "--text", text, "--text", str(other)) == (
        "two texts are named 'novel', by which results are listed; rename one of them."
    )
    assert sentence("eval", "kld", "--text", text, "-ub", "1") == (
        "the noise floor needs batches of two sizes; give -b and -ub of at least 2."
    )
    assert "x>=2" in sentence("eval", "ppl", "--text", text, "--continue", "1")
    assert not fake.log


def test_a_missing_rouge_is_noticed_before_the_model_is_loaded(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlocal.eval import scores

    monkeypatch.setattr(scores, "rouge", lambda _answer, _expected: fail(KVError("ROUGE needs rouge-score."))())
    (tmp_path / "news.jsonl").write_text('{"article": "It rained.", "highlights": "Rain."}\n')
    args = ["eval", "summarize", "--data", str(tmp_path / "news.jsonl")]
    assert sentence(*args, code=1) == "ROUGE needs rouge-score."
    assert not fake.log


@pytest.mark.parametrize("fault", [press_ctrl_c, fail(KeyboardInterrupt())])
def test_ctrl_c_shows_what_was_measured(fake: Fake, fault: Callable[[], None], tmp_path: Path) -> None:
    fake.fault, fake.fault_at = fault, 3
    result = call("eval", "needle", "-o", "json", "--plot", str(tmp_path / "needle.svg"))
    assert (result.exit_code, result.stderr) == (130, "")
    assert json.loads(result.stdout)["results"] == records.rows(NEEDLES[:3])
    assert (tmp_path / "needle.svg").exists() and fake.log[-1] == "close"


def test_ctrl_c_before_the_first_record_prints_nothing(fake: Fake) -> None:
    fake.fault, fake.fault_at = press_ctrl_c, 0
    result = call("eval", "needle")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_a_failure_keeps_what_was_measured(fake: Fake) -> None:
    fake.fault = fail(KVError("no memory for the case niah/7."))
    result = call("eval", "needle", "-o", "csv")
    assert (result.exit_code, result.stderr) == (1, "Error: no memory for the case niah/7.\n")
    assert result.stdout.count("\n") == 2


def test_without_matplotlib_the_error_says_how_to_get_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "needs matplotlib" in sentence("eval", "needle", "--plot", "needle.svg", code=1)
    assert not fake.log


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
