"""One conversation at the command line: turns, and what is shown of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvlocal.errors import ContextFullError, KVError
from kvlocal_cli.backend.cache import LiveFigures, evicted
from kvlocal_cli.backend.session_file import SessionFile
from kvlocal_cli.backend.transcript import Transcript
from kvlocal_cli.terminal.echo import NoEcho
from kvlocal_cli.terminal.interrupt import Interrupt
from kvlocal_cli.terminal.stream import Answer, stream

if TYPE_CHECKING:
    from kvlocal.engine.chat import Chat
    from kvlocal.engine.engine import Engine
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.render.screen import Screen

FULL = "Nothing is lost: /undo takes the last turn back, /clear starts anew; with /policy ladder the cache goes on."


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

    def next_line(self, source: Iterator[str]) -> str | None:
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
