"""`kvlocal demo`: one question about one document, with the whole cache and with a quarter of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from kvlocal.errors import UsageError
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.commands.run import complete, messages
from kvlocal_cli.options import completers
from kvlocal_cli.options.option import GroupedCommand, option
from kvlocal_cli.options.settings import SamplingSettings, Settings, demo_options, predict_option
from kvlocal_cli.render.controls import plain
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.stream import Answer

CACHES = (("full", "100%"), ("ladder", "25%"))


@click.command(cls=GroupedCommand)
@option(
    "Prompt", "--document", required=True, metavar="FILE", shell_complete=completers.files, help="A long UTF-8 text."
)
@option(
    "Prompt",
    "--question-file",
    "question",
    required=True,
    metavar="FILE",
    shell_complete=completers.files,
    help="A UTF-8 file with a question about it.",
)
@demo_options
@predict_option(48)
def demo(settings: Settings, document: str, question: str, n_predict: int) -> None:
    """Ask one question with the full cache, then a quarter.

    Prints both answers and a table of the memory and the speed that were measured, to standard output.

    \b
    kvlocal demo --document expedition.txt --question-file question.txt
    """
    from kvlocal_cli.render.report import comparison_table
    from kvlocal_cli.render.screen import Screen, out

    texts = [prompt.read_file(path).strip() for path in (document, question)]
    for path, text in zip((document, question), texts, strict=True):
        if not text:
            raise UsageError(f"'{path}' is empty.")
    greedy = backend.new_sampling(SamplingSettings(temp=0))
    screen = Screen()
    click.echo(f"Question: {plain(texts[1])}")
    reports: list[dict[str, Any]] = []
    # One engine after the other: two caches in memory at once would spoil what is measured.
    for policy, budget in CACHES:
        with backend.open_engine(replace(settings, policy=policy, budget=budget), screen) as engine:
            tokens = engine.chat_tokens(messages("\n\n".join(texts)))
            click.echo(f"\n--policy {policy} --budget {budget}")
            interrupt = complete(engine, tokens, n_predict, greedy, screen, Answer())
            if interrupt.requested:
                raise click.exceptions.Exit(interrupt.exit_code)
            reports.append(engine.report().as_dict())
    click.echo()
    out(comparison_table(reports))
