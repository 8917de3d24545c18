"""What the next tokens of sequences read of what is held: a retriever's units are kept up and chosen from."""

from __future__ import annotations

import functools

from kvlocal.engine.report import Reads
from kvlocal.engine.sequence import Sequence
from kvlocal.native.context import Context
from kvlocal.native.retrieval import Retrieved
from kvlocal.retrieval.retriever import Retriever


class Retrieving:
    """Lets a retriever choose what sequences of a context read."""

    def __init__(self, context: Context, retriever: Retriever) -> None:
        self.context = context
        self.retriever = retriever
        self._asked = retriever.retrieval()
        self._vocabulary = _Vocabulary(context)
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._n_steps = self._index_bytes = 0
        self._read = self._wanted = self._kept = self._seconds = 0.0

    def report(self) -> Reads:
        """Of all steps since :meth:`reset`."""
        read = self._read / max(self._n_steps, 1)
        kept = self._kept / self._wanted if self._wanted else None
        return Reads(str(self.retriever), read, kept, self._index_bytes, self._seconds)

    def index(self, sequence: Sequence) -> None:
        """Take up new tokens, before something is evicted or demoted of them."""
        assert self.context.cache is not None
        self.context.cache.index(sequence.seq, self._asked, self._close(sequence))

    def choose(self, sequence: Sequence) -> Retrieved:
        """Choose what the next token reads."""
        assert self.context.cache is not None
        step = self.context.cache.retrieve(sequence.seq, self._asked, self._close(sequence))
        sequence.narrowed = True
        self._n_steps += 1
        self._index_bytes = step.index_bytes
        self._read += step.n_read
        self._wanted += step.n_wanted
        self._kept += step.n_kept
        self._seconds += step.us / 1e6
        return step

    def _close(self, sequence: Sequence) -> list[int]:
        """The units that have closed since the last call."""
        begin = sequence.units[-1] if sequence.units else 0
        ends = [begin + end for end in self.retriever.ends(sequence.tokens[begin:], self._vocabulary)]
        sequence.units += ends
        return ends


class _Vocabulary:
    """What tokens stand for, remembered."""

    def __init__(self, context: Context) -> None:
        model = context.model
        self.piece = functools.cache(lambda token: model.piece(token).decode("utf-8", "replace"))
        self.entry = functools.cache(model.entry)
