"""A conversation on one cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvlocal.engine import session
from kvlocal.engine.engine import Engine, Progress
from kvlocal.engine.sequence import Mark, Sequence
from kvlocal.errors import KVError, UsageError
from kvlocal.native.sampling import Sampling


@dataclass
class _Turn:
    """Where a question and its answer begin: in the cache, and in the template text that the cache has seen."""

    before: Mark
    in_cache: str
    question: Mark | None = None
    in_cache_question: str = ""


class Chat:
    """Turns of one conversation; what was read or said stays in the cache and is not read again.

    Attributes:
        messages: ``{"role", "content"}`` in order, system message first if there is one.
        dropped: why the cache of the session that was loaded last could not be used, empty if it could.
        reread: whether the last question made the whole conversation be read again: after an edit of what was evicted,
            or by a template that rewrites earlier turns.
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.reread = False
        self.dropped = ""
        self._in_cache = ""  # template text that the cache has seen
        self._turns: list[_Turn] = []

    @property
    def sequence(self) -> Sequence:
        """Where it stands in the cache; a change of policy can make the cache anew."""
        return self.engine.sequences[0]

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def ask(
        self, text: str, n_predict: int, sampling: Sampling, *, on_progress: Progress | None = None
    ) -> Iterator[str]:
        """Ask and stream the answer. Closing the iterator early keeps what was said so far.

        Raises:
            KVError: the conversation does not fit; it is as before the question.
        """
        self._own()
        turn = _Turn(self.sequence.mark(logits=False), self._in_cache)
        question = {"role": "user", "content": text}
        self._read([*self.messages, question], on_progress)
        self.messages.append(question)
        self._turns.append(self._mark(turn))
        yield from self._answer(n_predict, sampling)

    def again(self, n_predict: int, sampling: Sampling, *, on_progress: Progress | None = None) -> Iterator[str]:
        """Another answer to the last question, in place of the one there is.

        Raises:
            UsageError: nothing was asked yet.
            KVError: the conversation had to be read again and does not fit.
        """
        self._own()
        i = self._last_question()
        answer = self.messages[i + 1 :]
        del self.messages[i + 1 :]
        turn = self._turns[-1] if self._turns else None
        question = turn.question if turn is not None else None
        if turn is not None and question and question.logits is not None and self.sequence.back(question):
            self.reread = False
            self._in_cache = turn.in_cache_question
        else:
            self.forget_cache()
            try:
                self._read(self.messages, on_progress)
            except BaseException:
                self.messages += answer
                raise
            self.reread = True
            self._turns = [self._mark(_Turn(Mark(0, None), ""))]
        yield from self._answer(n_predict, sampling)

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question.

        Raises:
            UsageError: nothing was asked yet.
        """
        self._own()
        i = self._last_question()
        question = self.messages[i]["content"]
        del self.messages[i:]
        turn = self._turns.pop() if self._turns else None
        if turn is not None and self.sequence.back(turn.before):
            self._in_cache = turn.in_cache
        else:
            self.forget_cache()
        return question

    def set_system(self, text: str) -> None:
        """Another system message, or none; the conversation will be read again."""
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest
        self.forget_cache()

    def forget_cache(self) -> None:
        """The cache is not what was said any more: the next question reads all of it again."""
        self.sequence.release()
        self._in_cache = ""
        self._turns = []

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._in_cache = ""
        self._turns = []
        self.engine.reset()

    def save(self, path: Path) -> int:
        """Write the conversation and its cache; see :func:`kvlocal.engine.session.save`."""
        self._own()
        return session.save(path, self.engine, session.Session(self.messages, self._in_cache))

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; see :func:`kvlocal.engine.session.load`."""
        try:
            found = session.load(path, self.engine)
        except KVError:
            if not self.sequence.tokens:
                self.forget_cache()
            raise
        self.messages, self.dropped, self._turns = found.messages, found.dropped, []
        self._in_cache = "" if found.dropped else found.in_cache
        self.sequence.owner = self

    def _own(self) -> None:
        """The cache may have been used for something else since the last turn; this conversation is read again then."""
        if self.sequence.owner is not self:
            self.forget_cache()
            self.sequence.owner = self

    def _last_question(self) -> int:
        """Its index among the messages."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise UsageError("Nothing was asked yet, so there is nothing to take back.")
        return asked[-1]

    def _mark(self, turn: _Turn) -> _Turn:
        """A turn whose question was just read."""
        turn.question, turn.in_cache_question = self.sequence.mark(), self._in_cache
        return turn

    def _read(self, messages: list[dict[str, str]], on_progress: Progress | None) -> None:
        """Make the cache end where the answer to the last message begins."""
        rendered = self.engine.model.chat_text(messages)
        self.reread = not self._in_cache and any(message["role"] == "assistant" for message in messages)
        try:
            if self._in_cache and rendered.startswith(self._in_cache):
                # tokens of the answer stay as they were generated; only what follows is new
                new = self.engine.tokenize(rendered[len(self._in_cache) :], add_special=False)
                self.engine.prefill(new, on_progress=on_progress)
            else:
                tokens = self.engine.model.template_tokens(rendered)
                self.reread |= self.engine.extend(tokens, on_progress=on_progress)
        except BaseException:  # Ctrl-C included
            if not self.sequence.tokens:
                self.forget_cache()  # rolled back to nothing: the next question reads it all again
            raise
        if self.reread:
            self._turns = []  # what they say of the cache is not so any more
        self._in_cache = rendered

    def _answer(self, n_predict: int, sampling: Sampling) -> Iterator[str]:
        answer = ""
        try:
            for piece in self.engine.generate(n_predict, sampling):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})
            self._in_cache += answer
