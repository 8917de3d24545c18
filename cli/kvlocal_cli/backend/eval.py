"""What `kvlocal eval` needs of kvlocal, imported when it is called; see :mod:`kvlocal_cli.backend.engine`."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvlocal.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kvlocal.eval.cases import Case
    from kvlocal.eval.evaluation import OnStep
    from kvlocal.eval.questions import Ask
    from kvlocal.eval.records import Record, Store
    from kvlocal.eval.stage import StageConfig
    from kvlocal.eval.texts import Kld, Ppl
    from kvlocal.measure.variants import Variant
    from kvlocal.native.model import Model
    from kvlocal_cli.options.settings import Settings
    from kvlocal_cli.render.screen import Screen


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
    retrieves: Sequence[str],
    retrieve_budgets: Sequence[int],
    archive: str,
    recall_budgets: Sequence[int],
    chunk: int,
    n_ubatch: int,
    parallel: int,
) -> EvalPlan:
    """What to measure; what can be wrong on the command line and in files is found here, before a model is loaded."""
    from kvlocal.eval.stage import StageConfig
    from kvlocal.measure.variants import archives, check_variants, expand, retrievers

    variants = expand(
        policies,
        settings.policy_args,
        budgets,
        storages,
        prefills,
        guides,
        here=settings.policy_typed,
        retrievers=retrievers(retrieves, settings.retrieve_args, retrieve_budgets),
        archives=archives(archive, recall_budgets),
    )
    check_variants(settings.kernels, variants)
    return EvalPlan(
        metric=metric,
        source=source,
        variants=variants,
        cases=_read_cases(metric, source),
        questions=questions,
        config=StageConfig(
            n_ctx=settings.n_ctx,
            parallel=parallel,
            n_ubatch=n_ubatch,
            n_threads=settings.n_threads,
            kernels=settings.kernels,
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
            "kernels": config.kernels,
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
