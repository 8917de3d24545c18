"""`kvlocal chat`: several turns on one cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal_cli.backend import engine as backend
from kvlocal_cli.backend.session_file import SessionFile
from kvlocal_cli.backend.transcript import Transcript
from kvlocal_cli.commands import slash
from kvlocal_cli.commands.conversation import Conversation
from kvlocal_cli.options.option import GroupedCommand, option
from kvlocal_cli.options.settings import (
    SamplingSettings,
    Settings,
    engine_options,
    predict_option,
    sampling_options,
    stats_option,
    system_option,
)
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.interrupt import Interrupt

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


QUOTES = '"""'


@click.command(cls=GroupedCommand)
@system_option
@engine_options
@predict_option(1024)
@sampling_options
@option(
    "Session", "--session", metavar="FILE", help="Go on with this saved conversation, and save it there at every turn."
)
@option(
    "Session",
    "--reread",
    is_flag=True,
    help="Read the text of the saved conversation again instead of using its cache: for a session of somebody else's.",
)
@option("Session", "--transcript", metavar="FILE", help="Append what is said to a Markdown file.")
@stats_option
def chat(
    settings: Settings,
    sampling: SamplingSettings,
    system: str | None,
    n_predict: int,
    session: str | None,
    reread: bool,
    transcript: str | None,
    stats: bool,
) -> None:
    """Talk with a model; all turns share one bounded cache.

    MODEL is a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used. Ctrl-C stops an answer and
    keeps the conversation, Ctrl-D leaves. When standard input is no terminal, each of its lines is one turn.

    \b
    kvlocal chat --budget 1024
    kvlocal chat -sys "Answer in one sentence." model.gguf
    kvlocal chat --session trip.kvl
    printf 'My name is Ada.\\nWhat is my name?\\n' | kvlocal chat --temp 0

    While chatting: /kv draws the cache, /stats shows all figures, /help lists all commands; \"\"\" begins and ends a
    question of several lines. A line whose first word is a slash and letters is a command, and one that is not there
    is an error; /etc/hosts is a word like any other.
    """
    from kvlocal_cli.render.screen import Screen

    system = prompt.system_text(system)
    interactive = prompt.stdin_is_terminal()
    drawing = backend.new_sampling(sampling)
    screen = Screen()
    with backend.open_engine(settings, screen) as engine, Interrupt(raise_from=3) as interrupt:
        if interactive:
            screen.line(
                f"{engine.model_name} · context {engine.n_ctx:,} · policy {settings.policy}, budget {settings.budget}"
                " · /help lists the commands",
                "dim",
            )
        talking = backend.new_chat(engine, system)
        file = SessionFile(session, talking, interrupt)
        talk = Conversation(talking, engine, screen, n_predict, drawing, interactive, interrupt)
        talk.session, talk.transcript, talk.stats = file, Transcript(transcript), stats
        if file.loaded and reread:
            talking.forget_cache()
        if file.loaded:
            screen.line(slash.loaded(talk, str(session)), "dim")
        try:
            obey(talk, TerminalLines() if interactive else prompt.stdin_lines())
        finally:
            file.save()
    if interrupt.requested:
        raise click.exceptions.Exit(interrupt.exit_code)


def obey(talk: Conversation, source: Iterator[str]) -> None:
    """Obey the lines until they end or one of them is /exit.

    Raises:
        KeyboardInterrupt, Ended: a signal came that ends the conversation.
    """
    lines = iter(lambda: talk.next_line(source), None)
    talk.note()
    for line in lines:
        text = line.strip()
        if text.startswith(QUOTES):
            text = between_quotes(text, lines)
        elif slash.is_command(text):
            if text.split()[0] == "/exit":
                return
            talk.guarded(lambda text=text: slash.run(talk, text))  # type: ignore[misc]
            text = ""
        if text:
            talk.guarded(lambda text=text: talk.turn(text))  # type: ignore[misc]
        talk.guarded(talk.session.save)


def between_quotes(first: str, lines: Iterator[str]) -> str:
    """The text from three quotes to the next three, over as many lines as it takes."""
    text = first.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        line = next(lines, None)
        if line is None:
            break
        text += f"\n{line.rstrip()}"
    return text.rstrip().removesuffix(QUOTES).strip()


class TerminalLines(Iterator[str]):
    """Lines typed at the terminal, with editing and history; Ctrl-C clears the line, Ctrl-D ends them.

    SIGINT from outside is a KeyboardInterrupt; the next line can be read all the same.
    """

    def __init__(self) -> None:
        self._session = new_session()

    def __next__(self) -> str:
        try:
            return self._session.prompt("> ")
        except EOFError:
            raise StopIteration from None


def new_session() -> PromptSession[str]:
    """Line editing with a history file in the user's state directory."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    path = history_file()
    history: History = InMemoryHistory() if path is None else FileHistory(str(path))
    # Answers may be sent to a file while somebody types: the prompt belongs where the terminal is.
    return PromptSession(history=history, key_bindings=keys, output=create_output(always_prefer_tty=True))


def history_file() -> Path | None:
    """The history file, readable by its owner only; None if there is no place for one."""
    from platformdirs import user_state_path

    try:
        path = user_state_path("kvlocal", appauthor=False, ensure_exists=True) / "history"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return None
    return path
