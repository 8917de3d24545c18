"""What the commands need of kvlocal, imported when it is called: `--help` stays fast, and tests replace these."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvlocal.errors import UsageError
from kvlocal_cli.backend.loading import load_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kvlocal.engine.chat import Chat
    from kvlocal.engine.config import EngineConfig
    from kvlocal.engine.engine import Engine
    from kvlocal.eval.cases import Case
    from kvlocal.eval.evaluation import OnStep
    from kvlocal.eval.questions import Ask
    from kvlocal.eval.records import Record, Store
    from kvlocal.eval.stage import StageConfig
    from kvlocal.eval.texts import Kld, Ppl
    from kvlocal.measure.bench import BenchConfig, Step
    from kvlocal.measure.variants import Variant
    from kvlocal.native.model import Model
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.options.settings import SamplingSettings, Settings
    from kvlocal_cli.render.screen import Screen


def versions() -> tuple[str, dict[str, Any]]:
    """The version of the package, and what its native libraries were built from."""
    from kvlocal import __version__
    from kvlocal.native.library import build_info

    return __version__, build_info()


def engine_config(settings: Settings, screen: Screen, n_seq_max: int = 1) -> EngineConfig:
    """The settings as the engine takes them; the model is fetched if need be, its download shown on `screen`."""
    from kvlocal.engine.config import EngineConfig
    from kvlocal.models.resolve import resolve_model
    from kvlocal.policies import make_policy
    from kvlocal.storage.budget import Budget
    from kvlocal.storage.storage import Storage

    # First what can be wrong on the command line: nobody should wait for a download to learn of a typing error.
    policy = make_policy(settings.policy, dict(settings.policy_args))
    budget = Budget.parse(settings.budget)
    with screen.download() as on_progress:
        model = resolve_model(settings.model, progress=on_progress)
    return EngineConfig(
        model=model,
        policy=policy,
        budget=budget,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        prefill=settings.prefill,
        chunk=settings.chunk,
        guide=settings.guide,
        storage=Storage.parse(settings.storage, tail=settings.storage_tail),
        evict_every=settings.evict_every,
        n_seq_max=n_seq_max,
    )


def open_engine(settings: Settings, screen: Screen) -> Engine:
    """Load the model and make its cache, showing a download and the loading on `screen`."""
    config = engine_config(settings, screen)
    with screen.status(f"Loading {config.model.name}"):
        return load_engine(config, screen)


def prefill_cached(
    name: str, engine: Engine, tokens: Sequence[int], on_progress: Callable[[int, int], None] | None
) -> int:
    """Read a prompt, but for what a prompt cache on disk has of it; how many tokens that is."""
    from kvlocal.engine.session import prefill_cached
    from kvlocal_cli.terminal.prompt import file_path

    return prefill_cached(file_path(name), engine, tokens, on_progress=on_progress)


def plan_run(
    settings: Settings, *, n_prompt: int, n_generate: int | None, parallel: int, memory: int | None, screen: Screen
) -> dict[str, Any]:
    """What a run will take (a `Plan`); `memory`: bytes to plan for, None for what this machine has free."""
    from kvlocal.measure.plan import Planner

    config = engine_config(settings, screen, parallel)
    with (
        screen.status(f"Planning with {config.model.name}"),
        Planner(config.model, n_gpu_layers=config.n_gpu_layers, free_bytes=memory) as planner,
    ):
        return planner.plan(config, n_prompt, -1 if n_generate is None else n_generate).as_dict()


def new_chat(engine: Engine, system: str | None) -> Chat:
    """An empty conversation on `engine`."""
    from kvlocal.engine.chat import Chat

    return Chat(engine, system)


def change_policy(engine: Engine, name: str, pairs: Sequence[str]) -> bool:
    """Another policy from now on, with `name=value` pairs; True if the cache was made anew."""
    from kvlocal.policies import make_policy
    from kvlocal_cli.options.settings import parse_policy_args

    return engine.change(policy=make_policy(name, parse_policy_args(tuple(pairs), sink=None, window=None)))


def change_budget(engine: Engine, text: str) -> bool:
    """Another budget from now on; True if the cache was made anew."""
    from kvlocal.storage.budget import Budget

    return engine.change(budget=Budget.parse(text))


def new_sampling(sampling: SamplingSettings) -> Sampling:
    """The settings of the command line as the engine takes them."""
    from kvlocal.native.sampling import Sampling

    return Sampling(**asdict(sampling))


def describe_policies() -> Sequence[Any]:
    """One row per policy: `name`, `summary`, `parameters`, `paper`."""
    from kvlocal.policies import describe

    return describe()


def plan_bench(
    settings: Settings,
    *,
    policies: Sequence[str],
    budgets: Sequence[str],
    storages: Sequence[str],
    prefills: Sequence[Any],
    depths: Sequence[int],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    chunk: int,
) -> BenchConfig:
    """What to measure; everything that can be wrong on the command line is found here, before a model is loaded."""
    from kvlocal.measure.bench import BenchConfig
    from kvlocal.measure.variants import expand

    return BenchConfig(
        variants=expand(policies, settings.policy_args, budgets, storages, prefills),
        depths=tuple(depths),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=repetitions,
        chunk=chunk,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        evict_every=settings.evict_every,
    )


def find_model(settings: Settings, random: str | None, screen: Screen) -> Path:
    """The file to measure, fetched or written first if need be."""
    from kvlocal.models.resolve import resolve_model

    if random is not None:
        from kvlocal.models.random import random_model

        with screen.status(f"Writing random weights: {random}"):
            return random_model(random)
    with screen.download() as on_progress:
        return resolve_model(settings.model, progress=on_progress)


def describe_machine(n_threads: int) -> dict[str, Any]:
    """Processor, cores, threads and measured memory bandwidth."""
    from kvlocal.measure.machine import describe_machine

    return asdict(describe_machine(n_threads))


def run_bench(
    path: Path, config: BenchConfig, n_gpu_layers: int, on_step: Callable[[Step], None]
) -> Iterator[dict[str, Any]]:
    """The results as they come."""
    from kvlocal.measure.bench import bench
    from kvlocal.native.model import Model

    model = Model(path, n_gpu_layers=n_gpu_layers)
    try:
        for result in bench(model, config, on_step):
            yield asdict(result)
    finally:
        model.close()


@dataclass(frozen=True)
class EvalPlan:
    """An evaluation as far as it is known without the model.

    Attributes:
        source: what the cases are made from, as it was typed.
        cases: those that were read from files.
        config: with a context of 0 if it is to be what the longest case needs.
    """

    metric: str
    source: Mapping[str, Any]
    cases: Sequence[Case]
    variants: tuple[Variant, ...]
    questions: Sequence[str]
    config: StageConfig


@dataclass(frozen=True)
class Evaluation:
    """The model's name, and `run(on_step)`, which yields the records as they come."""

    model: str
    run: Callable[[OnStep], Iterator[Record]]


def plan_eval(
    settings: Settings,
    metric: str,
    source: Mapping[str, Any],
    *,
    policies: Sequence[str],
    budgets: Sequence[str],
    storages: Sequence[str],
    prefills: Sequence[Any],
    guides: Sequence[int],
    questions: Sequence[str],
    chunk: int,
    n_ubatch: int,
    parallel: int,
) -> EvalPlan:
    """What to measure; what can be wrong on the command line and in files is found here, before a model is loaded."""
    from kvlocal.eval.stage import StageConfig
    from kvlocal.measure.variants import expand

    return EvalPlan(
        metric=metric,
        source=source,
        variants=expand(policies, settings.policy_args, budgets, storages, prefills, guides),
        cases=_read_cases(metric, source),
        questions=questions,
        config=StageConfig(
            n_ctx=settings.n_ctx,
            parallel=parallel,
            n_ubatch=n_ubatch,
            n_threads=settings.n_threads,
            chunk=chunk,
            evict_every=settings.evict_every,
        ),
    )


def _read_cases(metric: str, source: Mapping[str, Any]) -> Sequence[Case]:
    """The cases of the metrics that have them in files."""
    if metric == "ruler":
        from kvlocal.eval.tasks.ruler import ruler_cases

        return ruler_cases(source["data"], tasks=source["tasks"], rows=source["rows"])
    if metric == "kv-retrieval":
        from kvlocal.eval.tasks.kv_retrieval import kv_cases

        return kv_cases(source["data"], rows=source["rows"])
    if metric == "summarize":
        from kvlocal.eval.scores import rouge
        from kvlocal.eval.tasks.summarize import summary_cases

        # says at once if what it needs is not installed
        rouge("", [""])
        return summary_cases(source["data"], rows=source["rows"])
    return ()


def f32_model(path: Path, screen: Screen) -> Path:
    """The model with F32 weights, written first if need be."""
    from kvlocal.models.f32 import f32_copy

    with screen.download() as on_progress:
        return f32_copy(path, lambda done, total: on_progress(done, total, f"F32 copy of {path.name}"))


@contextmanager
def open_eval(path: Path, plan: EvalPlan, n_gpu_layers: int, fresh: bool, screen: Screen) -> Iterator[Evaluation]:
    """The model loaded, the cases made, the records of earlier runs read."""
    from kvlocal.eval.records import Store, store_path
    from kvlocal.native.model import Model

    with ExitStack() as stack:
        with screen.status(f"Loading {path.name}"):
            model = Model(path, n_gpu_layers=n_gpu_layers)
        stack.callback(model.close)
        with screen.status("Preparing the cases"):
            texts = plan.metric in ("kld", "ppl")
            longest, name, start = _prepare_texts(model, plan) if texts else _prepare_cases(model, plan)
        config = replace(plan.config, n_ctx=_n_ctx(plan, longest, name))
        if longest > model.n_ctx_train:
            screen.line(f"The model was trained for {model.n_ctx_train:,} tokens, {name} has {longest:,}.")
        # not what only says how work is spread: threads, and branches that are decoded together
        settings = {
            "chunk": config.chunk,
            "evict_every": config.evict_every,
            "n_ubatch": config.n_ubatch,
            "n_gpu_layers": n_gpu_layers,
        }
        store = Store(store_path(path, plan.metric, settings), fresh=fresh)
        stack.callback(store.close)
        yield Evaluation(model.name, start(config, store).run)


def _n_ctx(plan: EvalPlan, longest: int, name: str) -> int:
    """The context as it was asked for, or what the longest case needs."""
    # a guide is decoded after the last but one chunk of a text, and may reach past its end
    needed = longest + max(variant.guide for variant in plan.variants)
    if not plan.config.n_ctx:
        return -(-(needed + 64) // 64) * 64
    if needed >= plan.config.n_ctx:
        raise UsageError(
            f"{name} needs a context of {needed + 1} tokens, --ctx-size gives it {plan.config.n_ctx}; "
            "give more, or 0 for what is needed."
        )
    return plan.config.n_ctx


Prepared = tuple[int, str, "Callable[[StageConfig, Store], Ask | Kld | Ppl]"]
"""Tokens of the longest case, what it is called, and what runs all of them."""


def _prepare_texts(model: Model, plan: EvalPlan) -> Prepared:
    from kvlocal.eval.texts import Kld, Ppl, excerpts

    source = plan.source
    n_context, n_continue = source["n_context"], source["n_continue"]
    found = excerpts(model, source["texts"], n_context, n_continue, source["per_text"])
    kind = Kld if plan.metric == "kld" else Ppl
    return n_context + n_continue, "an excerpt", lambda config, store: kind(model, found, plan.variants, config, store)


def _prepare_cases(model: Model, plan: EvalPlan) -> Prepared:
    from kvlocal.eval.questions import Ask, turns
    from kvlocal.eval.scores import contains, rouge
    from kvlocal.eval.tasks.needle import needle_cases

    def count(text: str) -> int:
        return len(model.tokenize(text, add_special=False))

    def size(case: Case) -> int:
        tokens = turns(model, case)
        return len(tokens.document) + sum(map(len, tokens.questions)) + sum(q.n_answer for q in case.questions)

    cases = needle_cases(count, **plan.source) if plan.metric == "needle" else plan.cases
    longest, name = max((size(case), case.id) for case in cases)
    score = rouge if plan.metric == "summarize" else contains
    return (
        longest,
        f"the case {name}",
        lambda config, store: Ask(model, plan.metric, cases, score, plan.variants, plan.questions, config, store),
    )


def eval_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The table: means over cases."""
    from kvlocal.eval.records import rows

    return rows(records)


def write_eval_plot(records: Sequence[Record], path: Path) -> None:
    """Draw the results."""
    from kvlocal.eval.plot import write_plot

    write_plot(records, path)


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written after a long run."""
    from kvlocal.measure.bench_plot import check_plot

    check_plot(path)


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the results over depth."""
    from kvlocal.measure.bench_plot import write_plot

    write_plot(rows, path)
