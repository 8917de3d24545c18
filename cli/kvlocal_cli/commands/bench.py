"""`kvlocal bench`: speed and memory over depth, policy, storage, budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kvlocal import settings
from kvlocal.errors import KVError, UsageError
from kvlocal_cli.backend import bench as backend
from kvlocal_cli.backend import machine as backend_machine
from kvlocal_cli.options import completers, twins
from kvlocal_cli.options.click_types import Wholes
from kvlocal_cli.options.option import GroupedCommand, count, declared, declared_list, option
from kvlocal_cli.options.output import table_options
from kvlocal_cli.options.settings import (
    Settings,
    check_chunked,
    check_retrieved,
    n_prompt_option,
    retrieve_lists,
    sweep_options,
)
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.output_file import check_output, write_output

RANDOM_MODELS = ("llama-1b", "llama-8b-2l", "qwen-3b-4l")


@click.command(cls=GroupedCommand)
@option("Sweep", "-d", "--depth", "depths", type=Wholes(), default="0,4096", metavar="N,…", help="Tokens read before.")
@n_prompt_option("Sweep", "Tokens of a prompt batch at each depth; 0: skip.", default=512)
@count("Sweep", "-n", "--n-gen", default=32, minimum=0, help="Tokens to decode at each depth; 0: skip.")
@count("Sweep", "-r", "--repetitions", default=3, minimum=1, help="Rounds; medians are shown.")
@declared_list(
    settings.POLICY,
    "policies",
    "full,ada-snapkv",
    shell_complete=completers.policies,
    help="full: llama.cpp's own cache, the baseline; paged: ours with nothing evicted; else as in `kvlocal policies`.",
)
@declared_list(
    settings.BUDGET,
    "budgets",
    "25%",
    shell_complete=completers.budgets,
    help="How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of the depth) or 512MiB.",
)
@declared_list(
    settings.KV,
    "storages",
    "f16",
    shell_complete=completers.storages,
    help="How it is stored; q8 and q4 of full are llama.cpp's own types.",
)
@declared_list(
    settings.PREFILL,
    "prefills",
    "exact",
    metavar="MODE",
    help="exact: evict once, at the depth; chunked: after every chunk on the way there.",
)
@declared(settings.CHUNK, name="n_chunk")
@retrieve_lists
@sweep_options
@option(
    "Model",
    "--random-model",
    type=click.Choice(RANDOM_MODELS),
    help="Random weights in the shape of a real model, or of 2 or 4 of its layers, instead of MODEL.",
)
@table_options
def bench(
    settings: Settings,
    depths: tuple[int, ...],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    policies: tuple[str, ...],
    budgets: tuple[str, ...],
    storages: tuple[str, ...],
    prefills: tuple[str, ...],
    n_chunk: int,
    retrieves: tuple[str, ...],
    retrieve_budgets: tuple[int, ...],
    random_model: str | None,
    form: str,
    output_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure speed and memory by depth, policy, storage, budget.

    MODEL is a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used. Options that take a list
    (N,…) measure every combination, in one process and in turns, so that a machine that slows down does so for all.
    The text is random: contents do not matter for speed.

    \b
    kvlocal bench model.gguf -d 0,8192,32768 --budget 1024,25%
    kvlocal bench --policy full,paged,snapkv,ada-snapkv --format json --output-file speed.json
    kvlocal bench --policy full,paged --kv f16,q8,q4,kv2
    kvlocal bench --random-model llama-1b -d 0,16384 --plot speed.svg
    kvlocal bench -d 32768 -p 0 --policy full,paged --retrieve none,sentencekv
    kvlocal bench -d 65536 -p 0 --prefill exact,chunked --budget 2048
    """
    from kvlocal_cli.render.bench import step_text
    from kvlocal_cli.render.screen import Screen

    if random_model is not None and settings.model is not None:
        random_model = _pick_random(random_model, settings.model)
    if "chunked" not in prefills:
        check_chunked("n_chunk", "--chunk")
    if set(retrieves) <= {"none"}:
        check_retrieved()
    config = backend.plan_bench(
        settings,
        policies=policies,
        budgets=budgets,
        storages=storages,
        prefills=prefills,
        depths=depths,
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=repetitions,
        chunk=n_chunk,
        retrieves=retrieves,
        retrieve_budgets=retrieve_budgets,
    )
    for path in filter(None, (output_file, plot)):
        check_output(path)
    if plot is not None:
        backend.check_plot(plot)
    screen = Screen()
    path = backend_machine.find_model(settings, random_model, screen)
    with screen.status("Measuring memory bandwidth"):
        machine = backend_machine.describe_machine(settings.n_threads)
    rows: list[dict[str, Any]] = []
    with Interrupt() as interrupt, screen.progress(step_text) as show:

        def on_step(step: Any) -> None:
            interrupt.check()
            show(step)

        failure: BaseException | None = None
        try:
            for row in backend.run_bench(path, config, settings.n_gpu_layers, on_step):
                rows.append(row)
        except (KeyboardInterrupt, KVError, MemoryError) as error:
            failure = error
    if rows:
        _write(form, output_file, machine, rows)
        if plot is not None:
            backend.write_plot(rows, plot)
    if isinstance(failure, KeyboardInterrupt):
        raise click.exceptions.Exit(interrupt.exit_code)
    if failure is not None:
        raise failure


def _pick_random(random: str, model: str) -> str | None:
    """--random-model, or None for the model that was named beside it, if that was nearer to the command line."""
    if any(twins.overruled("random_model", by=name) for name in ("model", "hf")):
        return None
    if not all(twins.overruled(name, by="random_model") for name in ("model", "hf")):
        raise UsageError(f"two models are named, '{model}' and --random-model {random}; give one of them.")
    return random


def _write(form: str, file: Path | None, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from kvlocal_cli.render import bench as bench_output
    from kvlocal_cli.render import screen as render

    if form == "md" and file is None and sys.stdout.isatty():
        render.out(*bench_output.as_rich(machine, rows, render.out_width()))
        return
    text = {"md": bench_output.as_md, "json": bench_output.as_json, "csv": bench_output.as_csv}[form](machine, rows)
    if file is None:
        sys.stdout.write(text)
    else:
        write_output(file, text)
