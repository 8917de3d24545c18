"""`kvlocal eval`: what a policy loses, on texts, on questions about documents, on summaries."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from typing import Any

import click

from kvlocal import settings
from kvlocal.errors import KVError, UsageError
from kvlocal.setting import MAX_SEED
from kvlocal_cli.backend import bench as backend_bench
from kvlocal_cli.backend import eval as backend
from kvlocal_cli.backend import machine as backend_machine
from kvlocal_cli.options.click_types import Lengths, Names, Shares
from kvlocal_cli.options.eval import (
    Common,
    ask_option,
    common_options,
    data_options,
    text_options,
)
from kvlocal_cli.options.option import GroupedGroup, count, declared, option
from kvlocal_cli.options.settings import Settings, check_archived, check_chunked, check_retrieved
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.output_file import check_output, write_output


@click.group("eval", cls=GroupedGroup)
def evaluate() -> None:
    """Measure what policies lose, on texts and questions.

    What was measured is kept on record: a run goes on where an earlier one stopped, and only what is new is measured.
    Every command takes MODEL, a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used, with its
    weights as F32. Options that take a list (N,…) measure every combination.

    \b
    kvlocal eval needle model.gguf --policy paged,snapkv,ada-snapkv --budget 25%
    kvlocal eval kld --text novel.txt --policy paged,streaming,snapkv --budget 50%,25%,12.5%
    """


@evaluate.command()
@text_options(3072, 256, 3)
@common_options
def kld(common: Common, source: dict[str, Any]) -> None:
    """KL divergence of predictions after one eviction.

    Excerpts of texts are read and evicted, then continued. The predictions are compared with those of the same cache
    with nothing evicted: KL divergence, how often the likeliest token is the same, perplexity. The noise floor beside
    them is the same variant once more in other batches.

    \b
    kvlocal eval kld --text novel.txt --text essays.txt --budget 50%,25%,12.5%
    kvlocal eval kld model.gguf --f32 --text novel.txt --policy full,snapkv --format json --output-file kld.json
    """
    if _n_ubatch(common.settings) < 2:
        raise UsageError("the noise floor needs batches of two sizes; give -b and -ub of at least 2.")
    _measure(common, "kld", source)


@evaluate.command()
@text_options(1024, 1024, 1)
@common_options
def ppl(common: Common, source: dict[str, Any]) -> None:
    """Perplexity of a long continuation, evicted on the way.

    Excerpts of texts are read and continued; as they grow past the budget they are evicted again and again. The ratio
    is to the same cache with nothing evicted.

    \b
    kvlocal eval ppl --text novel.txt --budget 512,256 --evict-every 1
    kvlocal eval ppl model.gguf --text novel.txt --context 64 --continue 8192 --policy streaming,h2o
    """
    _measure(common, "ppl", source)


@evaluate.command()
@option(
    "Cases",
    "--lengths",
    type=Lengths(),
    default="1024,2048",
    metavar="N,…",
    help="Tokens of the documents, within 2 %.",
)
@option(
    "Cases",
    "--depths",
    type=Shares(),
    default="0,0.25,0.5,0.75,1",
    metavar="X,…",
    help="Where the fact stands, from 0 (beginning) to 1 (end).",
)
@option(
    "Cases",
    "--kind",
    type=click.Choice(["words", "numbers"]),
    default="numbers",
    help="What is to be found: five digits, or invented names, which small models take for other words of the text.",
)
@option(
    "Cases",
    "--mode",
    type=click.Choice(["single", "multi-key", "multi-turn"]),
    default="single",
    help="One fact; one of four facts that are alike; three facts, asked for one after the other.",
)
@count("Cases", "--repeats", default=1, minimum=1, help="Documents for each length and depth.")
@declared(
    settings.SEED,
    section="Cases",
    default=0,
    help="The same seed gives the same documents; -1: other ones every time.",
)
@ask_option("both")
@common_options
def needle(common: Common, questions: tuple[str, ...], **source: Any) -> None:
    """A fact in a long text, and a question about it.

    The text is generated, and no sentence of it but the fact could answer the question. The score is the share of
    questions whose answer holds what the fact says.

    \b
    kvlocal eval needle --policy paged,snapkv,ada-snapkv --budget 25% --plot needle.svg
    kvlocal eval needle model.gguf --lengths 4096,8192 --mode multi-turn --repeats 3
    """
    if source["seed"] < 0:
        source["seed"] = secrets.randbelow(MAX_SEED + 1)
    _measure(common, "needle", source, questions)


@evaluate.command()
@data_options("DIR", "Folder with one .jsonl file per task, as RULER's generator writes them.")
@option("Cases", "--tasks", type=Names(), default=None, metavar="NAME,…", help="Only these; without it, all.")
@ask_option("both")
@common_options
def ruler(common: Common, questions: tuple[str, ...], **source: Any) -> None:
    """RULER: rows made by its generator, by task.

    The score is the share of the expected strings that the answer holds.

    \b
    kvlocal eval ruler --data-dir ruler-4096 --rows 5 --policy paged,snapkv
    kvlocal eval ruler model.gguf --data-dir ruler-4096 --tasks niah_single_1,vt --ask after
    """
    _measure(common, "ruler", source | {"tasks": source["tasks"] or ()}, questions)


@evaluate.command()
@data_options("FILE", "JSON Lines of CNN/DailyMail or of LongBench's multi_news.")
@ask_option("inside")
@common_options
def summarize(common: Common, questions: tuple[str, ...], **source: Any) -> None:
    """Summaries of articles, scored by ROUGE.

    Needs rouge-score: pip install "kvlocal[eval]".

    \b
    kvlocal eval summarize --data cnn_dailymail.jsonl --rows 20 --policy paged,snapkv
    """
    _measure(common, "summarize", source, questions)


@evaluate.command("kv-retrieval")
@data_options("FILE", "JSON Lines of lost-in-the-middle's key-value retrieval.")
@ask_option("both")
@common_options
def kv_retrieval(common: Common, questions: tuple[str, ...], **source: Any) -> None:
    """One value out of a long object of random keys.

    \b
    kvlocal eval kv-retrieval --data kv_retrieval_75_keys.jsonl --rows 10 --policy paged,snapkv
    """
    _measure(common, "kv-retrieval", source, questions)


def _n_ubatch(chosen: Settings) -> int:
    """As llama.cpp has it: no physical batch is larger than the logical one."""
    return min(chosen.n_ubatch, chosen.n_batch)


def _measure(common: Common, metric: str, source: dict[str, Any], questions: Sequence[str] = ()) -> None:
    from kvlocal_cli.render.eval import case_text
    from kvlocal_cli.render.screen import Screen

    chosen = common.settings
    if "chunked" not in common.prefills:
        check_chunked("n_chunk", "--chunk")
        if any(common.guides):
            check_chunked("guides", "--guide")
    if set(common.retrieves) <= {"none"}:
        check_retrieved()
    check_archived(common.archive_to)
    for path in filter(None, (common.output_file, common.plot)):
        check_output(path)
    if common.plot is not None:
        backend_bench.check_plot(common.plot)
    plan = backend.plan_eval(
        chosen,
        metric,
        source,
        policies=common.policies,
        budgets=common.budgets,
        storages=common.storages,
        prefills=common.prefills,
        guides=common.guides,
        retrieves=common.retrieves,
        retrieve_budgets=common.retrieve_budgets,
        archive=common.archive_to,
        recall_budgets=common.recall_budgets,
        questions=questions,
        chunk=common.n_chunk,
        n_ubatch=_n_ubatch(chosen),
        parallel=common.parallel,
    )
    screen = Screen()
    file = backend_machine.find_model(chosen, None, screen)
    if common.f32:
        file = backend.f32_model(file, screen)
    records: list[Any] = []
    failure: BaseException | None = None
    with backend.open_eval(file, plan, chosen.n_gpu_layers, common.fresh, screen) as evaluation:
        about = {"metric": metric, "model": evaluation.model, "settings": _settings(common, source, questions)}
        with Interrupt() as interrupt, screen.progress(case_text) as show:

            def on_step(step: Any) -> None:
                interrupt.check()
                show(step)

            try:
                for record in evaluation.run(on_step):
                    records.append(record)
            except (KeyboardInterrupt, KVError, MemoryError) as error:
                failure = error
    if records:
        if common.form == "json":
            with screen.status("Measuring memory bandwidth"):
                about["machine"] = backend_machine.describe_machine(chosen.n_threads)
        _write(common, about, backend.eval_rows(records))
        if common.plot is not None:
            backend.write_eval_plot(records, common.plot)
    if isinstance(failure, KeyboardInterrupt):
        raise click.exceptions.Exit(interrupt.exit_code)
    if failure is not None:
        raise failure


def _settings(common: Common, source: dict[str, Any], questions: Sequence[str]) -> dict[str, Any]:
    """What the results depend on beside the variants, for the output."""
    chosen = common.settings
    return {
        "f32": common.f32,
        "chunk": common.n_chunk,
        "evict_every": chosen.evict_every,
        "n_ubatch": _n_ubatch(chosen),
        "n_gpu_layers": chosen.n_gpu_layers,
        "kernels": chosen.kernels,
        "parallel": common.parallel,
        **({"questions": questions} if questions else {}),
        **source,
    }


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _write(common: Common, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from kvlocal_cli.render import eval as eval_output
    from kvlocal_cli.render import screen as render

    if common.form == "md" and common.output_file is None and _on_terminal():
        render.out(*eval_output.as_rich(about, rows, render.out_width()))
        return
    text = {"md": eval_output.as_md, "json": eval_output.as_json, "csv": eval_output.as_csv}[common.form](about, rows)
    if common.output_file is None:
        sys.stdout.write(text)
    else:
        write_output(common.output_file, text)
