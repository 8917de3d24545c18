"""`kvlocal run`: one prompt, one answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvlocal.settings import RAW
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.options import completers
from kvlocal_cli.options.option import GroupedCommand, declared, option
from kvlocal_cli.options.settings import (
    SamplingSettings,
    Settings,
    engine_options,
    predict_option,
    sampling_options,
    system_option,
)
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.stream import INTERRUPTED, Answer, Interrupt, stream

if TYPE_CHECKING:
    from kvlocal.engine.engine import Engine
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.render.screen import Screen


@click.command(cls=GroupedCommand)
@option("Prompt", "-p", "--prompt", "text", metavar="TEXT", help="The prompt.")
@option(
    "Prompt",
    "-f",
    "--file",
    "files",
    type=click.Path(),
    multiple=True,
    metavar="FILE",
    shell_complete=completers.files,
    help="A UTF-8 file with the prompt; - reads standard input. May be repeated: one text after the other.",
)
@system_option
@declared(RAW)
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
    as_json: bool,
) -> None:
    """Answer one prompt.

    MODEL is a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used. The prompt comes from -p,
    from -f or through a pipe; text of files or a pipe comes first, then the text of -p, blank lines between them.

    The answer goes to standard output, everything else to standard error.

    \b
    kvlocal run -p "Name three rivers."
    kvlocal run -f report.txt -p "Who signed it?" --budget 25%
    kvlocal run model.gguf --policy snapkv --kv-window 64 --json < prompt.txt
    """
    from kvlocal_cli.render.screen import Screen, figures

    system = prompt.system_text(system, raw=raw)
    question = prompt.gather(text, files)
    drawing = backend.new_sampling(sampling)
    screen = Screen()
    with backend.open_engine(settings, screen) as engine:
        if raw:
            tokens = engine.tokenize(question)
        else:
            tokens = engine.chat_tokens(messages(question, system))
            screen.note(engine.template_note(messages(question, system)))
        answer = None if as_json else Answer(live=live)
        interrupted = complete(engine, tokens, n_predict, drawing, screen, answer, prompt_cache)
        report = engine.report().as_dict()
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        screen.line(figures(report), "dim")
    if interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


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
) -> bool:
    """Process `tokens`, then write what follows them to `answer`; True if Ctrl-C ended it early."""
    with Interrupt() as interrupt:
        with screen.prefill() as bar:

            def on_progress(done: int, total: int) -> None:
                bar.update(done, total)
                interrupt.check()

            if prompt_cache is None:
                engine.prefill(tokens, on_progress=on_progress)
            else:
                n = backend.prefill_cached(prompt_cache, engine, tokens, on_progress)
                screen.line(f"{n:,} of {len(tokens):,} tokens of the prompt were in {prompt_cache}.", "dim")
        try:
            stream(engine.generate(n_predict, sampling), answer.write if answer else _ignore, interrupt)
        finally:
            if answer:
                answer.end()
    return interrupt.requested


def _ignore(_piece: str) -> None:
    """For --json: the engine's report holds the text."""
