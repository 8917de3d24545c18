"""`kvlocal chat`: several turns on one cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal.errors import KVError

from . import backend, prompt
from .options import (
    GroupedCommand,
    SamplingSettings,
    Settings,
    engine_options,
    predict_option,
    sampling_options,
    system_option,
)
from .stream import Answer, Interrupt, stream

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from kvlocal.chat import Chat
    from kvlocal.engine import Engine
    from kvlocal.sampling import Sampling

    from .render import Screen

COMMANDS = {
    "/kv": "draw how many tokens every layer and head holds",
    "/stats": "show all measured figures",
    "/clear": "forget the conversation",
    "/help": "show this list",
    "/exit": "leave (or Ctrl-D)",
}


@click.command(cls=GroupedCommand)
@system_option
@engine_options
@predict_option(1024)
@sampling_options
def chat(settings: Settings, sampling: SamplingSettings, system: str | None, n_predict: int) -> None:
    """Talk with a model; all turns share one bounded cache.

    MODEL is a GGUF file or hf:USER/REPO[:FILE]; without it, a small default model is used. Ctrl-C stops an answer and
    keeps the conversation, Ctrl-D leaves. When standard input is no terminal, each of its lines is one turn.

    \b
    kvlocal chat --budget 1024
    kvlocal chat -sys "Answer in one sentence." model.gguf
    printf 'My name is Ada.\\nWhat is my name?\\n' | kvlocal chat --temp 0

    While chatting: /kv draws the cache, /stats shows all figures; /clear, /help, /exit.
    """
    from .render import Screen

    if system is not None:
        prompt.check_text(system, "the text of -sys")
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
        talk = Conversation(backend.new_chat(engine, system), engine, screen, n_predict, drawing, interactive)
        talk.run(terminal_lines() if interactive else prompt.stdin_lines())


class Conversation:
    """Turns and commands, one per line."""

    def __init__(
        self, chat: Chat, engine: Engine, screen: Screen, n_predict: int, sampling: Sampling, interactive: bool
    ) -> None:
        self.chat = chat
        self.engine = engine
        self.screen = screen
        self.n_predict = n_predict
        self.sampling = sampling
        self.interactive = interactive
        self.answered = False

    def run(self, lines: Iterator[str]) -> None:
        """Obey the lines until they end or one of them is /exit."""
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if text.startswith("/"):
                if text.split()[0] == "/exit":
                    return
                self.command(text.split()[0])
            else:
                self.turn(text)

    def turn(self, text: str) -> None:
        """Ask, write the answer, show its figures."""
        from .render import figures

        answer = Answer()
        try:
            interrupted = self._ask(text, answer)
        except KVError as error:
            # Somebody who types can do something about it; a script has to learn of it from the exit code.
            if not self.interactive:
                raise
            self.screen.line(f"Error: {error}", "red")
            return
        if answer.started or not interrupted:
            self.answered = True
            self.screen.line(figures(self.engine.report().as_dict()), "dim")
        else:
            self.screen.line("Interrupted before the answer began.", "dim")
        if interrupted and not self.interactive:
            raise KeyboardInterrupt

    def _ask(self, text: str, answer: Answer) -> bool:
        """Write the answer to `text`; True if Ctrl-C ended it early."""
        with Interrupt() as interrupt, self.screen.prefill() as bar:

            def on_progress(done: int, total: int) -> None:
                bar.update(done, total)
                interrupt.check()

            def write(piece: str) -> None:
                bar.stop()
                answer.write(piece)

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

    def command(self, name: str) -> None:
        """A line that starts with a slash, save for /exit."""
        from .render import held_map, stats_table

        if name == "/kv":
            held = self.engine.held()
            if held:
                self.screen.show(held_map(held))
            else:  # without eviction the engine runs on llama.cpp's own cache, which has no heads to tell apart
                self.screen.line("Nothing is evicted with this policy: every head holds every token.")
        elif name == "/stats":
            if self.answered:
                self.screen.show(stats_table(self.engine.report().as_dict()))
            else:
                self.screen.line("There is no answer yet, so nothing was measured.")
        elif name == "/clear":
            self.chat.clear()
            self.answered = False
            self.screen.line("The conversation is cleared.")
        elif name == "/help":
            for command, summary in COMMANDS.items():
                self.screen.line(f"{command:<8}{summary}")
        else:
            self.screen.line(f"There is no command {name}; the commands are {', '.join(COMMANDS)}.")


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
