"""`kvlocal chat`: several turns on one cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal.errors import ContextFullError, KVError, UsageError
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.commands import slash as chat_commands
from kvlocal_cli.options.option import GroupedCommand, option
from kvlocal_cli.options.settings import (
    SamplingSettings,
    Settings,
    engine_options,
    predict_option,
    sampling_options,
    system_option,
)
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.stream import Answer, Interrupt, stream

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
    "Session", "--session", metavar="FILE", help="Go on with this saved conversation, and save it there at the end."
)
@option("Session", "--transcript", metavar="FILE", help="Append what is said to a Markdown file.")
def chat(
    settings: Settings,
    sampling: SamplingSettings,
    system: str | None,
    n_predict: int,
    session: str | None,
    transcript: str | None,
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
    question of several lines.
    """
    from kvlocal_cli.render.screen import Screen

    system = prompt.system_text(system)
    interactive = prompt.stdin_is_terminal()
    drawing = backend.new_sampling(sampling)
    screen = Screen()
    with backend.open_engine(settings, screen) as engine:
        if interactive:
            screen.line(
                f"{engine.model_name} · context {engine.n_ctx:,} · policy {settings.policy}, budget {settings.budget}"
                " · /help lists the commands",
                "dim",
            )
        talk = Conversation(
            backend.new_chat(engine, system), engine, screen, n_predict, drawing, interactive, Transcript(transcript)
        )
        with keep_session(talk, session):
            talk.run(terminal_lines() if interactive else prompt.stdin_lines())


@contextmanager
def keep_session(talk: Conversation, name: str | None) -> Iterator[None]:
    """Load the session that is there, and save it at the end, however that comes, if anything was said."""
    if name is None:
        yield
        return
    path = prompt.file_path(name)
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder '{path.parent}' for the session {name}.")
    system = talk.chat.system
    if path.exists():
        talk.chat.load(path)
        talk.screen.line(chat_commands.loaded(talk, name), "dim")
        if system is not None and talk.chat.system != system:
            talk.chat.set_system(system)
    before = [dict(message) for message in talk.chat.messages]
    try:
        yield
    finally:
        if talk.chat.messages and talk.chat.messages != before:
            talk.chat.save(path)


class Transcript:
    """A Markdown file that what is said is appended to, turn by turn; nothing without a name."""

    def __init__(self, name: str | None) -> None:
        self._path = None if name is None else prompt.file_path(name)
        self._append("")  # says at once if it cannot be written

    def turn(self, question: str | None, answer: str) -> None:
        """``question``: ``None`` if it is the last one, answered again."""
        asked = "(again)" if question is None else question
        self._append(f"**You:** {asked}\n\n{answer.strip()}\n\n")

    def note(self, text: str) -> None:
        self._append(f"*{text}*\n\n")

    def _append(self, text: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)


class Conversation:
    """Turns and commands, one per line, but for questions between lines of three quotes."""

    def __init__(
        self,
        chat: Chat,
        engine: Engine,
        screen: Screen,
        n_predict: int,
        sampling: Sampling,
        interactive: bool,
        transcript: Transcript,
    ) -> None:
        self.chat = chat
        self.engine = engine
        self.screen = screen
        self.n_predict = n_predict
        self.sampling = sampling
        self.interactive = interactive
        self.transcript = transcript
        self.answered = False
        self.pending: list[str] = []  # texts of /read
        self._noted = False

    def note(self) -> None:
        """Say once how the chat template takes a system prompt that it has no role for."""
        if not self._noted and (note := self.chat.note) is not None:
            self._noted = True
            self.screen.note(note)

    def run(self, lines: Iterator[str]) -> None:
        """Obey the lines until they end or one of them is /exit."""
        self.note()
        for line in lines:
            text = line.strip()
            if text.startswith(QUOTES):
                text = between_quotes(text, lines)
            elif text.startswith("/"):
                if text.split()[0] == "/exit":
                    return
                self.guarded(lambda text=text: chat_commands.run(self, text))  # type: ignore[misc]
                continue
            if text:
                self.guarded(lambda text=text: self.turn(text))  # type: ignore[misc]

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
        from kvlocal_cli.render.screen import figures

        answer = Answer()
        if text is not None and self.pending:
            text = "\n\n".join([*self.pending, text])
        interrupted = self._ask(text, answer)
        if text is not None and (answer.started or not interrupted):
            self.pending.clear()
        if answer.started or not interrupted:
            self.answered = True
            if self.chat.reread:
                self.screen.line("What had changed was evicted, so the whole conversation was read again.", "dim")
            self.transcript.turn(text, self.chat.messages[-1]["content"])
            self.screen.line(figures(self.engine.report().as_dict()), "dim")
        else:
            self.screen.line("Interrupted before the answer began.", "dim")
        if interrupted and not self.interactive:
            raise KeyboardInterrupt

    def _ask(self, text: str | None, answer: Answer) -> bool:
        """Write the answer to `text`, or another one to the last question; True if Ctrl-C ended it early."""
        with Interrupt() as interrupt, self.screen.prefill() as bar:

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
        if answer.started or not interrupt.requested:
            answer.end()
        return interrupt.requested


def between_quotes(first: str, lines: Iterator[str]) -> str:
    """The text from three quotes to the next three, over as many lines as it takes."""
    text = first.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        line = next(lines, None)
        if line is None:
            break
        text += f"\n{line.rstrip()}"
    return text.rstrip().removesuffix(QUOTES).strip()


def terminal_lines() -> Iterator[str]:
    """Lines typed at the terminal, with editing and history; Ctrl-C clears the line, Ctrl-D ends them."""
    session = new_session()
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:  # sent from outside: pressing the keys is handled by the session
            continue


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
