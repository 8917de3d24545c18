"""A conversation on one cache."""

from __future__ import annotations

from collections.abc import Iterator

from kvlocal.engine import Engine, Progress
from kvlocal.sampling import Sampling


class Chat:
    """Turns of one conversation; what was read or said stays in the cache and is not read again.

    Attributes:
        messages: ``{"role", "content"}`` in order, system message first if there is one.
        reread: whether the last question made the whole conversation be read again (a template that rewrites earlier
            turns, after an eviction).
    """

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.reread = False
        self._in_cache = ""  # template text that the cache has seen

    def ask(
        self, text: str, n_predict: int, sampling: Sampling, *, on_progress: Progress | None = None
    ) -> Iterator[str]:
        """Ask and stream the answer. Closing the iterator early keeps what was said so far.

        Raises:
            KVError: the conversation does not fit; it is as before the question.
        """
        question = {"role": "user", "content": text}
        rendered = self.engine.model.chat_text([*self.messages, question])
        self.reread = False
        try:
            if self._in_cache and rendered.startswith(self._in_cache):
                # tokens of the answer stay as they were generated; only what follows is new
                new = self.engine.tokenize(rendered[len(self._in_cache) :], add_special=False)
                self.engine.prefill(new, on_progress=on_progress)
            else:
                tokens = self.engine.model.template_tokens(rendered)
                self.reread = self.engine.extend(tokens, on_progress=on_progress) and bool(self._in_cache)
        except BaseException:  # Ctrl-C included
            if not self.engine.tokens[0]:
                self._in_cache = ""  # rolled back to nothing: the next question reads it all again
            raise
        self.messages.append(question)
        self._in_cache = rendered
        answer = ""
        try:
            for piece in self.engine.generate(n_predict, sampling):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})
            self._in_cache += answer

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self._in_cache = ""
        self.engine.reset()
