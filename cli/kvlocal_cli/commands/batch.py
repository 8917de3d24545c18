"""`kvlocal batch`: many documents, one JSON line each."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import click

from kvlocal.errors import UsageError
from kvlocal.settings import RAW
from kvlocal_cli.backend import batch as backend_batch
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.options import twins
from kvlocal_cli.options.option import Callback, GroupedCommand, declared, option
from kvlocal_cli.options.settings import (
    SamplingSettings,
    Settings,
    inputs_options,
    parallel_option,
    predict_option,
    sampling_options,
    system_option,
)
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.interrupt import Interrupt

SOME_FAILED = 3

TASKS = {
    "summarize": "Summarize the following text in a few sentences.",
    "extract": "List the names, dates, places and figures in the following text, one per line.",
    "qa": "Read the following text, then answer the question after it in one sentence.",
}


def task_options(command: Callback) -> Callback:
    """What to do with every document, as `instruction`; and `question`, for those that bring none."""

    @option("Task", "--instruction", metavar="TEXT", help="What to do with every document; it stands before its text.")
    @option("Task", "--task", type=click.Choice(list(TASKS)), help="An instruction that is ready made.")
    @option("Task", "--question", metavar="TEXT", help="After every document that has no question of its own.")
    @declared(RAW, section="Task", help="Continue every text as it is: no roles.")
    @functools.wraps(command)
    def gather(**options: Any) -> Any:
        task, raw = options.pop("task"), options["raw"]
        if twins.overruled("instruction", by="task"):
            options["instruction"] = None
        elif twins.overruled("task", by="instruction"):
            task = None
        if task and options["instruction"]:
            raise UsageError("--task and --instruction both say what to do; give one of them.")
        options["instruction"] = TASKS[task] if task else options["instruction"] or ""
        if not options["instruction"] and not options["question"] and not raw:
            raise UsageError("Say what to do with the documents: --instruction TEXT, --task NAME or --question TEXT.")
        if task == "qa":
            options["needs_question"] = True
        for name in ("instruction", "question"):
            prompt.check_text(options[name] or "", f"the text of --{name}")
        return command(**{"needs_question": False} | options)

    return gather


@click.command(cls=GroupedCommand)
@option(
    "Output", "-o", "--output", metavar="OUT", required=True, help="The .jsonl file for the results; -: print them."
)
@option("Output", "--resume", is_flag=True, help="Go on with OUT: skip what it has, try again what failed.")
@option("Output", "--fail-fast", is_flag=True, help="Stop at the first document that fails.")
@option("Input", "--field", default="text", metavar="NAME", help="The text's field in a .jsonl file.")
@option("Input", "--id-field", default="id", metavar="NAME", help="The id's; without it FILE:LINE is the id.")
@option("Input", "--question-field", default="question", metavar="NAME", help="The question's, if there is one.")
@parallel_option(1, "Documents at a time; a budget in bytes is for all of them.", section="Task")
@option("Task", "--prompt-cache", metavar="FILE", help="Keep the cache of what all documents have in common here.")
@task_options
@system_option
@inputs_options
@predict_option(256)
@sampling_options
def batch(
    settings: Settings,
    sampling: SamplingSettings,
    inputs: tuple[str, ...],
    output: str,
    resume: bool,
    fail_fast: bool,
    field: str,
    id_field: str,
    question_field: str,
    parallel: int,
    instruction: str,
    question: str | None,
    needs_question: bool,
    raw: bool,
    prompt_cache: str | None,
    system: str | None,
    n_predict: int,
) -> None:
    """Work through documents, one JSON line each.

    INPUTS are text files, directories (.txt, .md and .jsonl files in them), globs in quotes, and .jsonl files with a
    document per line. MODEL is a GGUF file or hf:USER/REPO[:FILE], told from an input by that.

    A line is written as soon as a document is done: id, source, text, finish_reason, tokens, kv, timing, error, and the
    settings that it was made with; --resume refuses a file that was made with others. A document that fails has a line
    with its error; the exit code is 3 then, 0 if none failed. Nothing is cut silently: what is longer than the context
    is read in chunks, if the policy evicts, or fails.

    \b
    kvlocal batch articles/ -o summaries.jsonl --task summarize --parallel 4
    kvlocal batch model.gguf "papers/*.txt" -o out.jsonl --instruction "Name the method." --budget 25%
    kvlocal batch questions.jsonl -o answers.jsonl --task qa --field article --resume
    """
    from kvlocal_cli.render.batch import batch_bar, summary

    system = prompt.system_text(system, raw=raw)
    drawing = backend.new_sampling(sampling)
    documents = backend_batch.read_documents(inputs, output, text=field, id=id_field, question=question_field)
    documents = documents.asked(question or "", needed=needs_question)
    made_with = backend_batch.result_settings(
        settings,
        drawing,
        parallel,
        instruction=instruction,
        question=question or "",
        system=system or "",
        raw=raw,
        field=field,
        n_predict=n_predict,
    )
    with ExitStack() as stack:
        results = stack.enter_context(backend_batch.open_results(output, resume, made_with))
        waiting = documents.without(results.done)
        n_skipped = len(documents) - len(waiting)
        from kvlocal_cli.render.screen import Screen

        screen = Screen()
        if n_skipped:
            screen.line(f"{n_skipped} of {len(documents)} documents are in {results.name} already.", "dim")
        if not waiting:
            return
        work = stack.enter_context(
            backend_batch.open_batch(
                settings, waiting, system, instruction, raw, n_predict, drawing, parallel, prompt_cache, screen
            )
        )
        interrupt = stack.enter_context(Interrupt())
        bar = stack.enter_context(batch_bar(screen.console, len(waiting)))
        failed = 0

        def on_step(step: Any) -> None:
            bar.update(step)
            interrupt.check()

        try:
            for result in work.run(waiting, on_step):
                results.put(asdict(result))
                failed += result.error is not None
                if failed and fail_fast:
                    break
        except KeyboardInterrupt:
            interrupt.requested = True
        bar.stop()
        screen.line(summary(bar.last, bar.seconds, results.name), "dim")
    if interrupt.requested:
        raise click.exceptions.Exit(interrupt.exit_code)
    if failed:
        raise click.exceptions.Exit(SOME_FAILED)
