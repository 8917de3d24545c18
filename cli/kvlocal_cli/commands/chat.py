"""`kvlocal chat`: several turns on one cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal.errors import ContextFullError, KVError
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.backend.cache import LiveFigures, evicted
from kvlocal_cli.backend.session_file import SessionFile
from kvlocal_cli.backend.transcript import Transcript
from kvlocal_cli.commands import slash
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
from kvlocal_cli.terminal.echo import NoEcho
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.stream import Answer, stream

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from kvlocal.engine.chat import Chat
    from kvlocal.engine.engine import Engine
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.render.screen import Screen

QUOTES = '"""'
FULL = "Nothing is lost: /undo takes the last turn back, /clear starts anew; with /policy ladder the cache goes on."


@click.command(cls=GroupedCommand)
@system_option
@engine_options
@predict_option(1024)
@sampling_options
@option(
    "Session", "--session", metavar="FILE", help="Go on with this saved conversation, and save it there at every turn."
)
@option("Session", "--transcript", metavar="FILE", help="Append what is said to a Markdown file.")
@stats_option
def chat(
    settings: Settings,
    sampling: SamplingSettings,
    system: str | None,
    n_predict: int,
    session: str | None,
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
        if file.loaded:
            screen.line(slash.loaded(talk, str(session)), "dim")
        try:
            talk.run(TerminalLines() if interactive else prompt.stdin_lines())
        finally:
            file.save()
    if interrupt.requested:
        raise click.exceptions.Exit(interrupt.exit_code)


class Conversation:
    """Turns and commands, one per line, but for questions between lines of three quotes.

    Attributes:
        session: saved after every turn.
        transcript: what is said is appended to it.
        stats: whether what is measured is shown.
    """

    def __init__(
        self,
        chat: Chat,
        engine: Engine,
        screen: Screen,
        n_predict: int,
        sampling: Sampling,
        interactive: bool,
        interrupt: Interrupt,
    ) -> None:
        self.chat = chat
        self.engine = engine
        self.screen = screen
        self.n_predict = n_predict
        self.sampling = sampling
        self.interactive = interactive
        self.interrupt = interrupt
        self.session = SessionFile(None, chat, interrupt)
        self.transcript = Transcript(None)
        self.stats = True
        self.answered = False
        self.pending: list[str] = []  # texts of /read
        self._noted = False

    def note(self) -> None:
        """Say once how the chat template takes a system prompt that it has no role for."""
        if not self._noted and (note := self.chat.note) is not None:
            self._noted = True
            self.screen.note(note)

    def run(self, source: Iterator[str]) -> None:
        """Obey the lines until they end or one of them is /exit.

        Raises:
            KeyboardInterrupt, Ended: a signal came that ends the conversation.
        """
        lines = iter(lambda: self._next(source), None)
        self.note()
        for line in lines:
            text = line.strip()
            if text.startswith(QUOTES):
                text = between_quotes(text, lines)
            elif slash.is_command(text):
                if text.split()[0] == "/exit":
                    return
                self.guarded(lambda text=text: slash.run(self, text))  # type: ignore[misc]
                text = ""
            if text:
                self.guarded(lambda text=text: self.turn(text))  # type: ignore[misc]
            self.guarded(self.session.save)

    def _next(self, source: Iterator[str]) -> str | None:
        """The next line; here signals need not wait."""
        while True:
            try:
                with self.interrupt.raising_from(1):
                    return next(source, None)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.interrupt.clear()

    def guarded(self, do: Callable[[], None]) -> None:
        """Somebody who types can do something about a failure; a script has to learn of it from the exit code."""
        try:
            do()
        except KVError as error:
            if not self.interactive:
                raise
            self.screen.line(f"Error: {error}", "red")
            if isinstance(error, ContextFullError):
                self.screen.line(FULL)
                if self.pending:
                    self.pending.clear()
                    self.screen.line("What /read has put before the question is taken away again.")

    def turn(self, text: str | None) -> None:
        """Ask, or with ``None`` answer the last question again; write the answer, show its figures."""
        from kvlocal_cli.render.report import figures

        if self.interactive:
            self.interrupt.clear()
        answer = Answer(figures=LiveFigures(self.engine) if self.stats else None)
        if text is not None and self.pending:
            text = "\n\n".join([*self.pending, text])
        was_evicted = evicted(self.engine)
        self._ask(text, answer)
        interrupted = self.interrupt.requested
        if text is not None and (answer.started or not interrupted):
            self.pending.clear()
        if answer.started or not interrupted:
            self.answered = True
            self.transcript.turn(text, self.chat.messages[-1]["content"])
            if self.chat.reread:
                why = "What had changed was evicted, so the" if was_evicted else "The"
                self.screen.line(f"{why} whole conversation was read again.", "dim")
            if self.stats:
                self.screen.line(figures(self.engine.report().as_dict()), "dim")
        else:
            self.screen.line("Interrupted before the answer began.", "dim")
        if self.interactive:
            self.interrupt.clear()

    def _ask(self, text: str | None, answer: Answer) -> None:
        """Write the answer to `text`, or another one to the last question, until it ends or a signal comes."""
        interrupt = self.interrupt
        with (
            interrupt.raising_from(2),
            NoEcho(discard=True, on_stop=answer.hide_figures),
            self.screen.prefill() as bar,
        ):

            def on_progress(done: int, total: int) -> None:
                bar.update(done, total)
                interrupt.check()

            def write(piece: str) -> None:
                bar.stop()
                answer.write(piece)

            if text is None:
                pieces = self.chat.again(self.n_predict, self.sampling, on_progress=on_progress)
            else:
                pieces = self.chat.ask(text, self.n_predict, self.sampling, on_progress=on_progress)
            try:
                stream(pieces, write, interrupt)
            except KVError:
                if answer.started:
                    answer.end()
                raise
            bar.stop()
            if answer.started or not interrupt.requested:
                answer.end()


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
