"""A conversation on one cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvlocal.engine import session
from kvlocal.engine.engine import Engine, Progress
from kvlocal.engine.sequence import Mark, Sequence, n_common
from kvlocal.errors import KVError, UsageError
from kvlocal.models.template import chat_pieces
from kvlocal.native.sampling import Sampling
from kvlocal.native.text import check_text


@dataclass
class _Turn:
    """Where a question and its answer begin in the cache; ``question``: ``None`` if that is not known any more."""

    before: Mark
    question: Mark | None = None


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
        self.messages: list[dict[str, str]] = _system(system)
        self.reread = False
        self.dropped = self.left_out = ""
        self._answers: dict[int, list[int]] = {}  # by message: the tokens of an answer as they were generated
        self._turns: list[_Turn] = []

    @property
    def sequence(self) -> Sequence:
        """Where it stands in the cache; a change of policy can make the cache anew."""
        return self.engine.sequences[0]

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @property
    def note(self) -> str | None:
        """What the user should know of how the chat template takes the conversation."""
        return self.engine.template_note(self.messages)

    def ask(
        self, text: str, n_predict: int, sampling: Sampling, *, on_progress: Progress | None = None
    ) -> Iterator[str]:
        """Ask and stream the answer. Closing the iterator early keeps what was said so far.

        Raises:
            UsageError: the question is empty, or the chat template refuses the conversation.
            KVError: the conversation does not fit; it is as before the question.
        """
        with self.engine.use():
            self._own()
            turn = _Turn(self.sequence.mark(logits=False))
            question = {"role": "user", "content": text}
            self._read([*self.messages, question], on_progress, turn)
            self.messages.append(question)
            self._turns.append(self._mark(turn))
            answer = self._answer(n_predict, sampling)
            first = next(answer, None)  # nobody else's text comes between the question and its answer
        yield from begun(first, answer)

    def again(self, n_predict: int, sampling: Sampling, *, on_progress: Progress | None = None) -> Iterator[str]:
        """Another answer to the last question, in place of the one there is.

        Raises:
            UsageError: nothing was asked yet.
            KVError: the conversation had to be read again and does not fit.
        """
        with self.engine.use():
            self._own()
            self._return_to_question(on_progress)
            answer = self._answer(n_predict, sampling)
            first = next(answer, None)
        yield from begun(first, answer)

    def _return_to_question(self, on_progress: Progress | None) -> None:
        """Take the last answer back, so that another one can begin."""
        i = self._last_question()
        answer = self.messages[i + 1 :]
        del self.messages[i + 1 :]
        turn = self._turns[-1] if self._turns else None
        question = turn.question if turn is not None else None
        if turn is not None and question and question.logits is not None and self.sequence.back(question):
            self.reread = False
            return
        self.forget_cache()
        try:
            self._read(self.messages, on_progress)
        except BaseException:
            self.messages += answer
            raise
        self.reread = True
        self._turns = [self._mark(_Turn(Mark(0, None)))]

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question.

        Raises:
            UsageError: nothing was asked yet.
        """
        with self.engine.use():
            self._own()
            i = self._last_question()
            question = self.messages[i]["content"]
            del self.messages[i:]
            turn = self._turns.pop() if self._turns else None
            if turn is None or not self.sequence.back(turn.before):
                self.forget_cache()
            return question

    def set_system(self, text: str) -> None:
        """Another system message, or none; the conversation will be read again."""
        system = _system(text)
        n_before = 0 if self.system is None else 1
        self.messages = [*system, *self.messages[n_before:]]
        self._answers = {i + len(system) - n_before: tokens for i, tokens in self._answers.items()}
        self.forget_cache()

    def forget_cache(self) -> None:
        """The cache is not what was said any more: the next question reads all of it again."""
        with self.engine.use():
            self.sequence.release()
            self._turns = []

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._answers, self._turns = {}, []
        self.engine.reset()

    def save(self, path: Path) -> int:
        """Write the conversation and its cache; see :func:`kvlocal.engine.session.save`."""
        with self.engine.use():
            self._own()
            answers = {str(i): tokens for i, tokens in self._answers.items()}
            return session.save(path, self.engine, session.Session(self.messages, answers, kind="chat"))

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; see :func:`kvlocal.engine.session.load`."""
        with self.engine.use():
            try:
                found = session.load(path, self.engine, "chat")
            except KVError:
                if not self.sequence.tokens:
                    self.forget_cache()
                raise
            self.messages, self.dropped, self._turns = found.messages, found.dropped, []
            self.left_out = found.note
            self._answers = {int(i): tokens for i, tokens in found.answers.items()}
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
        turn.question = self.sequence.mark()
        return turn

    def _read(self, messages: list[dict[str, str]], on_progress: Progress | None, turn: _Turn | None = None) -> None:
        """Make the cache end where the answer to the last message begins; ``turn``: the one that begins with it."""
        tokens = self._tokens(messages)
        had = list(self.sequence.tokens)
        self.reread = not had and any(message["role"] == "assistant" for message in messages)
        try:
            self.reread |= self.engine.extend(tokens, on_progress=on_progress)
        finally:  # after Ctrl-C too
            if self.reread:
                self._turns = []  # what they say of the cache is not so any more
            n_same = n_common(had, self.sequence.tokens)
            for each in [*self._turns, turn] if turn is not None else self._turns:
                _keep(each, n_same)
            if not self.sequence.tokens:
                self.forget_cache()  # rolled back to nothing: the next question reads it all again

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation up to the next answer.

        Earlier answers are the tokens that were generated, where the template shows their text (up to white space
        around it).
        """
        model = self.engine.model
        pieces = chat_pieces(model, messages)
        parts = model.tokenize_parts([(piece.text, piece.control) for piece in pieces])
        for i, piece in enumerate(pieces):
            answer = self._answers.get(-1 if piece.message is None else piece.message)
            if answer and piece.path == ("content",) and _same(piece.text, messages[piece.message or 0]["content"]):
                parts[i] = answer
        return [token for part in parts for token in part]

    def _answer(self, n_predict: int, sampling: Sampling) -> Generator[str]:
        answer, start = "", len(self.sequence.tokens)
        try:
            for piece in self.engine.generate(n_predict, sampling):
                answer += piece
                yield piece
        finally:
            self._answers = {i: tokens for i, tokens in self._answers.items() if i < len(self.messages)}
            if self.sequence.owner is self:
                self._answers[len(self.messages)] = self.sequence.tokens[start:]
            self.messages.append({"role": "assistant", "content": answer})


def begun(first: str | None, rest: Generator[str]) -> Iterator[str]:
    """The pieces of an answer whose first one is known; closed with it."""
    try:
        if first is not None:
            yield first
            yield from rest
    finally:
        rest.close()


def _same(a: str, b: str) -> bool:
    """Equal but for white space around them."""
    return a.strip() == b.strip()


def _keep(turn: _Turn, n: int) -> None:
    """Only the first ``n`` tokens of the cache are as they were: the template has rewritten an earlier answer."""
    if turn.before.n > n:
        turn.before = Mark(n, None)
    if turn.question is not None and turn.question.n > n:
        turn.question = None


def _system(text: str | None) -> list[dict[str, str]]:
    """The system message, if there is one."""
    return [{"role": "system", "content": check_text(text, "The system prompt")}] if text else []
