"""`kvlocal run`: one prompt, one answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvlocal.errors import KVError
from kvlocal.settings import RAW
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.backend.cache import LiveFigures, prefill_cached
from kvlocal_cli.options import completers
from kvlocal_cli.options.option import Callback, GroupedCommand, declared, option, stack
from kvlocal_cli.options.settings import (
    SamplingSettings,
    Settings,
    engine_options,
    predict_option,
    sampling_options,
    stats_option,
    system_option,
)
from kvlocal_cli.render.controls import plain_json
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.echo import NoEcho
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.stream import Answer, stream

if TYPE_CHECKING:
    from kvlocal.engine.engine import Engine
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.render.screen import Screen


def prompt_options(command: Callback) -> Callback:
    """-p, -f, -sys and --no-chat-template: as `text`, `files`, `system` and `raw`."""
    return stack(
        option("Prompt", "-p", "--prompt", "text", metavar="TEXT", help="The prompt."),
        option(
            "Prompt",
            "-f",
            "--file",
            "files",
            type=click.Path(),
            multiple=True,
            metavar="FILE",
            shell_complete=completers.files,
            help="A UTF-8 file with the prompt; - reads standard input. May be repeated: one text after the other.",
        ),
        system_option,
        declared(RAW),
    )(command)


@click.command(cls=GroupedCommand)
@prompt_options
@option(
    "Prompt",
    "--prompt-cache",
    metavar="FILE",
    help="Keep the prompt's cache here, and use it again.",
)
@engine_options
@predict_option(512)
@sampling_options
@option("Output", "--stream/--no-stream", "live", default=True, help="Write the answer piece by piece, or at its end.")
@stats_option
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object: the answer and all measured figures.")
def run(
    settings: Settings,
    sampling: SamplingSettings,
    text: str | None,
    files: tuple[str, ...],
    system: str | None,
    raw: bool,
    prompt_cache: str | None,
    n_predict: int,
    live: bool,
    stats: bool,
    as_json: bool,
) -> None:
    """Answer one prompt.

    MODEL is a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used. The prompt comes from -p,
    from -f or through a pipe; text of files or a pipe comes first, then the text of -p, blank lines between them.

    The answer goes to standard output, everything else to standard error. On a terminal the answer is wrapped between
    words, control characters in it are dropped, and a line below it shows what is measured while it is written; in a
    pipe every byte is as it comes.

    \b
    kvlocal run -p "Name three rivers."
    kvlocal run -f report.txt -p "Who signed it?" --budget 25%
    kvlocal run model.gguf --policy snapkv --kv-window 64 --json < prompt.txt
    """
    from kvlocal_cli.render.report import figures
    from kvlocal_cli.render.screen import Screen

    system = prompt.system_text(system, raw=raw)
    question = prompt.gather(text, files)
    drawing = backend.new_sampling(sampling)
    screen = Screen()
    with backend.open_engine(settings, screen) as engine:
        tokens = prompt_tokens(engine, question, system, raw, screen)
        answer = None if as_json else Answer(live=live, figures=LiveFigures(engine) if stats else None)
        interrupt = complete(engine, tokens, n_predict, drawing, screen, answer, prompt_cache)
        report = engine.report().as_dict()
    if as_json:
        click.echo(plain_json(json.dumps(report, ensure_ascii=False, allow_nan=False)))
    elif stats:
        screen.line(figures(report), "dim")
    if interrupt.requested:
        raise click.exceptions.Exit(interrupt.exit_code)


def prompt_tokens(engine: Engine, question: str, system: str | None, raw: bool, screen: Screen) -> list[int]:
    """The prompt as the model reads it: `raw` as it is, else with the chat template around it."""
    if raw:
        return engine.tokenize(question)
    asked = messages(question, system)
    tokens = engine.chat_tokens(asked)
    screen.note(engine.template_note(asked))
    return tokens


def messages(question: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation that waits for its first answer."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": question}]


def complete(
    engine: Engine,
    tokens: list[int],
    n_predict: int,
    sampling: Sampling,
    screen: Screen,
    answer: Answer | None,
    prompt_cache: str | None = None,
) -> Interrupt:
    """Process `tokens`, then write what follows them to `answer`; says whether a signal ended it early."""
    # keys are for the shell afterwards
    with Interrupt() as interrupt, NoEcho(discard=False, on_stop=answer.hide_figures if answer else _nothing):
        read_prompt(engine, tokens, screen, interrupt, prompt_cache)
        try:
            stream(engine.generate(n_predict, sampling), answer.write if answer else _ignore, interrupt)
        finally:
            if answer:
                answer.end()
    return interrupt


def read_prompt(
    engine: Engine, tokens: list[int], screen: Screen, interrupt: Interrupt, prompt_cache: str | None = None
) -> None:
    """Process `tokens`, but for what the prompt cache has of them; show how far that is."""
    with screen.prefill() as bar:

        def on_progress(done: int, total: int) -> None:
            bar.update(done, total)
            interrupt.check()

        def on_unsaved(error: KVError) -> None:
            bar.stop()
            screen.unsaved(error)

        if prompt_cache is None:
            engine.prefill(tokens, on_progress=on_progress)
            return
        n = prefill_cached(prompt_cache, engine, tokens, on_progress, on_unsaved)
        bar.stop()
        screen.line(f"{n:,} of {len(tokens):,} tokens of the prompt were in {prompt_cache}.", "dim")


def _ignore(_piece: str) -> None:
    """For --json: the engine's report holds the text."""


def _nothing() -> None:
    """Without an answer there is nothing to take away."""
