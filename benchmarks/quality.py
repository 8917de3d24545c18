"""What every policy loses: the figures of docs/results.md.

Texts continued after an eviction, RULER, key-value retrieval, summaries, chunked prompts with and without a guide, and
memory over ten thousand generated tokens; the default model with its weights as F32. What was measured is kept: a run
goes on where it stopped, and measures only what is new.

    python benchmarks/quality.py                     # everything, some three hours, then the page
    python benchmarks/quality.py --only kld,page     # one part, then the page from all that is there
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, parser
from pages.quality import write_page
from quality_storage import MORE, all_kept, at_equal_bytes

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.eval.cases import Case, Score
from kvlocal.eval.evaluation import Step
from kvlocal.eval.questions import Ask
from kvlocal.eval.records import Record, Store, rows, store_path
from kvlocal.eval.scores import contains, rouge
from kvlocal.eval.stage import StageConfig
from kvlocal.eval.tasks.kv_retrieval import kv_cases
from kvlocal.eval.tasks.ruler import ruler_cases
from kvlocal.eval.tasks.summarize import summary_cases
from kvlocal.eval.texts import Kld, Ppl, excerpts
from kvlocal.measure.code import commit
from kvlocal.measure.variants import PAGED, Variant, expand
from kvlocal.models.f32 import f32_copy
from kvlocal.models.resolve import resolve_model
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampling
from kvlocal.policies import REGISTRY, make_policy
from kvlocal.storage.budget import Budget

BUDGETS = ("50%", "25%", "12.5%")
NOVELS = ("Burnett_Garden_1911.txt", "Doyle_Hound_1902.txt")
OTHERS = {
    "snapkv, no pooling": ("snapkv", {"pool": "none"}),
    "expected-attention, ada": ("expected-attention", {"allocation": "ada"}),
    "buzz, prefill_fit": ("buzz", {"prefill_fit": "yes"}),
    "random, 4 sinks": ("random", {"sink": "4"}),
}
"""Beside every policy with its defaults."""

N_GENERATED = 10_000
N_ANSWER = 48  # most tokens of an answer to RULER, which allows 128
TINY = ROOT / "tests" / "fixtures" / "kvlocal-tiny-q8_0.gguf"


def variants(budgets: Sequence[str] = BUDGETS, others: bool = False) -> list[Variant]:
    """Nothing evicted, then every policy, and if wanted the others, at every budget."""
    out = list(expand([PAGED], {}, []))
    policies = {name: make_policy(name) for name, cls in REGISTRY.items() if cls.evicts}
    policies |= {label: make_policy(*named) for label, named in OTHERS.items() if others}
    for name, policy in policies.items():
        out += [Variant(name, policy, Budget.parse(budget)) for budget in budgets]
    return out


def shortened(cases: Sequence[Case]) -> list[Case]:
    """The same with short answers: what is asked for is said at once or not at all."""
    return [
        replace(case, questions=tuple(replace(q, n_answer=min(q.n_answer, N_ANSWER)) for q in case.questions))
        for case in cases
    ]


class Run:
    """The model, the data, and where results go."""

    def __init__(self, model: Model, data: Path, threads: int, parallel: int, name: str = "quality") -> None:
        self.model, self.data, self.parallel, self.name = model, data, parallel, name
        self.config = StageConfig(n_ctx=8192, n_threads=threads, parallel=parallel)

    def collect(self, part: str, measure: Callable[[Store], Any]) -> list[dict[str, Any]]:
        settings = {"chunk": self.config.chunk, "evict_every": self.config.evict_every}
        store = Store(store_path(self.model.path, part, settings))
        start = time.perf_counter()

        def on_step(step: Step) -> None:
            print(f"{part} {step.done}/{step.total} {step.what} {time.perf_counter() - start:.0f} s", flush=True)

        records: list[Record] = []
        try:
            for record in measure(store).run(on_step):
                records.append(record)
        finally:
            store.close()
            if records:
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / f"{self.name}-{part}.json").write_text(json.dumps(rows(records), indent=1) + "\n")
        return rows(records)

    def ask(self, part: str, cases: Sequence[Case], score: Score, wanted: Sequence[Variant], *modes: str) -> Any:
        return self.collect(part, lambda store: Ask(self.model, part, cases, score, wanted, modes, self.config, store))

    def sized(self, n_ctx: int) -> StageConfig:
        """The settings with another context."""
        return replace(self.config, n_ctx=n_ctx)

    def texts(self) -> list[Path]:
        return [self.data / "text" / name for name in NOVELS]

    #
    # parts
    #

    def kld(self) -> None:
        found = excerpts(self.model, self.texts(), 3072, 256, 3)
        wanted = [*expand(["full"], {}, []), *variants(others=True)]
        config = replace(self.config, n_ctx=3072 + 256 + 64)
        table = self.collect("kld", lambda store: Kld(self.model, found, wanted, config, store))
        # the sizes of buzz are not a budget: the others at what it held
        held = sorted({round(r["held_tokens"]) for r in table if r["policy"] == "buzz" and r["task"] == "all"})
        control = [*expand([PAGED], {}, []), *expand(["buzz"], {}, BUDGETS)]
        control += expand(["streaming", "snapkv", "ada-snapkv", "h2o"], {}, [str(n) for n in held])
        # of the same size with more of it recent, and what is older sampled more thinly
        for window, stride in ((452, 9), (600, 17)):
            policy = make_policy("buzz", {"window": str(window), "stride": str(stride)})
            control.append(Variant(f"buzz, window {window}, stride {stride}", policy, Budget.parse("50%")))
        self.collect("kld-buzz", lambda store: Kld(self.model, found, control, config, store))

    def ppl(self) -> None:
        found = excerpts(self.model, self.texts(), 1024, 1024, 1)
        config = replace(self.config, n_ctx=2048 + 64)
        wanted = variants(("384",))
        self.collect("ppl", lambda store: Ppl(self.model, found, wanted, config, store))

    def ruler(self) -> None:
        cases = shortened(ruler_cases(self.data / "ruler-4096", rows=5))
        # a row of every task, then the next: a run that is cut short has as many of each
        cases.sort(key=lambda case: int(case.id.split("/")[1]))
        self.ask("ruler", cases, contains, variants(), "inside", "after")

    def kv(self) -> None:
        cases = kv_cases(self.data / "needle" / "kv_retrieval_75_keys.jsonl", rows=5)
        self.ask("kv", cases, contains, variants(), "inside", "after")

    def summaries(self) -> None:
        cases = summary_cases(self.data / "summarization" / "cnn_dailymail.jsonl", rows=20)
        self.ask("summaries", cases, rouge, variants(), "inside")

    def storage(self) -> None:
        """Dropped or stored in fewer bits, at equal bytes; and what each storage loses when nothing is dropped."""
        config = replace(self.config, n_ctx=3072 + 256 + 64)
        found = excerpts(self.model, self.texts(), 3072, 256, 6)
        for part, some, wanted in (
            ("storage", found, [*at_equal_bytes(3072), *all_kept()]),
            ("storage_kept", found[:2], [*all_kept(), *all_kept(MORE), *expand(["full"], {}, [], ["q8", "q4"])]),
        ):
            self.collect(part, lambda store, some=some, wanted=wanted: Kld(self.model, some, wanted, config, store))

    def storage_ruler(self) -> None:
        cases = shortened(ruler_cases(self.data / "ruler-4096", rows=5))
        cases.sort(key=lambda case: int(case.id.split("/")[1]))
        wanted = [*at_equal_bytes(3800), *all_kept(("f16",))]
        self.ask("storage_ruler", cases, contains, wanted, "inside")

    def guide(self) -> None:
        """Single needles under chunked prefill, with and without a guide, against exact prefill."""
        cases = ruler_cases(self.data / "ruler-4096", tasks=["niah_single_1", "niah_single_2"], rows=10)
        wanted = [*expand([PAGED], {}, []), *expand(["ada-snapkv"], {}, ["25%"], prefills=["exact"])]
        wanted += expand(["ada-snapkv"], {}, ["25%"], prefills=["chunked"], guides=[0, 64])
        self.ask("guide", shortened(cases), contains, wanted, "inside")

    def growth(self) -> None:
        """Bytes of the pools while an answer of ten thousand tokens is generated, by the small model of the tests.

        Pages and budgets do not depend on the weights.
        """
        text = (ROOT / "demo" / "expedition-log.txt").read_text("utf-8")
        out = []
        for name, cls in REGISTRY.items():
            if not cls.evicts:
                continue
            policy = make_policy(name)
            # one thread: so small a model is no faster with more
            with Engine(EngineConfig(TINY, policy, Budget.parse("256"), n_ctx=12288, n_threads=1)) as engine:
                out.append({"policy": name, "commit": commit()} | grow(engine, engine.tokenize(text)[:1024]))
                print(out[-1], flush=True)
        (RESULTS / "quality-growth.json").write_text(json.dumps(out, indent=1) + "\n")


def grow(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    """Most bytes allocated in the first and in the last thousand tokens of an answer, and how often it was evicted."""
    engine.prefill(prompt)
    cache = engine.cache
    assert cache is not None
    allocated = [
        engine.context.stats().allocated_bytes for _ in engine.generate(N_GENERATED, Sampling(temp=0, ignore_eos=True))
    ]
    tokens = len(engine.sequences[0].tokens) - len(prompt)
    part = len(allocated) // 10
    return {
        "tokens": tokens,
        "evictions": engine.context.stats().n_evict // len(cache.layers),
        "first": max(allocated[:part]),
        "last": max(allocated[-part:]),
        "full": engine.report().kv.full_bytes,
    }


PARTS = ("storage", "storage_ruler", "kld", "ruler", "summaries", "kv", "guide", "ppl", "growth")


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--only", default=",".join([*PARTS, "page"]), help="parts, with commas between them")
    p.add_argument("--parallel", type=int, default=32, help="branches that are decoded together")
    args = p.parse_args()
    wanted = args.only.split(",")
    model = Model(f32_copy(resolve_model(args.model)))
    run = Run(model, args.data, args.threads, args.parallel)
    for part in PARTS:
        if part in wanted:
            getattr(run, part)()
    if "page" in wanted:
        write_page(RESULTS, ROOT / "docs" / "results.md", model.name)


if __name__ == "__main__":
    main()
