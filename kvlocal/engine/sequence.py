"""One conversation or document in a context: the tokens that were read, what of them may be missing, the ways back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kvlocal.errors import KVError
from kvlocal.native.context import Context

FEW_TOKENS = 8
"""More tokens at once are read as a prompt is, which sees everything that is held, whatever a retriever has chosen."""


def n_common(a: Tokens[int], b: Tokens[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


@dataclass(frozen=True)
class Mark:
    """A place in a sequence to come back to: its first ``n`` tokens, and the logits after them if they were known."""

    n: int
    logits: np.ndarray | None


class Sequence:
    """The tokens of one sequence of a context, and what became of them in the cache.

    Attributes:
        seq: its number in the context.
        tokens: all that was read, in order.
        rolled: tokens read minus the next position: what renumbering took away.
        evicted_at: tokens before this index may have been evicted; edits after it need no re-read.
        look_at: how many tokens it may have before the :class:`~kvlocal.engine.evictor.Evictor` looks at it again;
            ``None``: any number.
        owner: whose text it holds, for those who share an engine.
        holder: what reads or answers now; another object once somebody else has changed the sequence.
        units: how many tokens come before the end of each closed unit of a retriever that the cache knows of.
        narrowed: the next tokens read only what a retriever has chosen.
        archived: its units are written to an archive; archive_file: the one beside its session that they lie in.
    """

    def __init__(self, context: Context, seq: int) -> None:
        self.context = context
        self.seq = seq
        self.owner: object = None
        self.holder: object = None
        self.archived = False
        self._forget()

    @classmethod
    def adopt(cls, context: Context, seq: int) -> Sequence:
        """A sequence that somebody else has filled: how many its tokens are is known, what they are is not."""
        out = cls(context, seq)
        out.tokens = [-1] * context.n_seen(seq)
        return out

    def _forget(self) -> None:
        self.tokens: list[int] = []
        self.rolled = self.evicted_at = 0
        self.look_at: int | None = None
        self.units: list[int] = []
        self.narrowed = False
        self.archive_file: Path | None = None
        self.keep_logits(None)

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.tokens) - self.rolled

    #
    # logits
    #

    @property
    def output(self) -> int | None:
        """Which output of the context's last batch has the logits after the last token, counted from its end (-1: the
        last one); ``None``: none has."""
        if self._output is None or self._output[0] != self.context.n_decoded:
            return None
        return self._output[1]

    @property
    def kept_logits(self) -> np.ndarray | None:
        """Logits given by :meth:`keep_logits`; they hold until the sequence changes."""
        return self._kept

    def last_logits(self) -> np.ndarray | None:
        """After the last token, float32 ``[n_vocab]``, if they are known."""
        if self._kept is not None or self.output is None:
            return self._kept
        return self.context.logits(self._n_outputs)[self.output]

    def keep_logits(self, logits: np.ndarray | None) -> None:
        """What the answer begins with: :meth:`last_logits` of a time when the sequence was as it is now."""
        self._kept = logits
        self._output: tuple[int, int] | None = None
        self._n_outputs = 0

    #
    # change
    #

    def reach(self, n: int) -> int:
        """The most tokens up to ``n`` that the sequence can be cut to, 0: all have to be read again."""
        if not self.evicted_at <= n <= len(self.tokens):
            return 0
        if n == len(self.tokens):
            return n
        reached = self.context.reach(self.seq, n - self.rolled) + self.rolled
        return reached if reached >= max(self.evicted_at, self.rolled + 1) else 0

    def cut(self, n: int) -> bool:
        """Truncate to ``n`` tokens. If something was evicted after token ``n``, or a sliding window or a recurrent
        state has gone on, that is impossible: the sequence is emptied, ``False`` is returned."""
        possible = self.reach(n) == n
        self.holder = None
        self.keep_logits(None)
        if possible and self.context.truncate(self.seq, n - self.rolled):
            self.forget_after(n)
            return True
        self.release()
        return False

    def forget_after(self, n: int) -> None:
        """The cache was cut to ``n`` tokens: so is what is known of them. A unit that ended there is open again,
        unless it is archived."""
        del self.tokens[n:]
        while self.units and self.units[-1] >= n + self.archived:
            self.units.pop()
        if not self.units:
            self.archive_file = None

    def read_all(self) -> None:
        """Let the next tokens read everything that is held, until a retriever chooses again."""
        if self.narrowed and self.context.cache is not None:
            self.context.cache.read_all(self.seq)
        self.narrowed = False

    def release(self) -> None:
        """Empty the sequence and give its memory back."""
        self.holder = None
        self.context.truncate(self.seq, 0)
        self._forget()

    def branch(self, other: Sequence) -> None:
        """Make ``other`` a copy of this one; their pages are shared until one of them writes."""
        self.context.branch(self.seq, other.seq)
        other.holder = None
        other.tokens = list(self.tokens)
        other.rolled, other.evicted_at, other.look_at = self.rolled, self.evicted_at, self.look_at
        other.units, other.narrowed, other.archived = list(self.units), self.narrowed, self.archived
        other.keep_logits(self._kept)

    def mark(self, *, logits: bool = True) -> Mark:
        """This place, for :meth:`back`; with its logits, if an answer may begin there again. The way back to the two
        latest is kept where a cache cannot be cut; see :meth:`PagedCache.mark`."""
        self.context.mark(self.seq)
        return Mark(len(self.tokens), self.last_logits() if logits else None)

    def back(self, mark: Mark) -> bool:
        """Cut to a marked place; ``False`` if that is impossible, and the sequence is empty, as after :meth:`cut`."""
        if not self.cut(mark.n):
            return False
        self.keep_logits(mark.logits)
        return True

    def load(
        self,
        saved: bytes | memoryview,
        tokens: Iterable[int],
        *,
        rolled: int,
        evicted_at: int,
        logits: np.ndarray | None,
    ) -> None:
        """Put a saved cache in the place of this sequence; see :mod:`kvlocal.engine.session`.

        Raises:
            KVError: it does not fit or is damaged; the sequence is as before, or empty.
        """
        tokens = list(tokens)
        try:
            self.context.restore(self.seq, saved)
        except KVError:
            if self.context.n_seen(self.seq) == 0:
                self.release()
            raise
        n_seen = self.context.n_seen(self.seq)
        if n_seen + rolled != len(tokens):
            self.release()
            raise KVError(f"The saved cache has seen {n_seen} tokens, its text has {len(tokens)}.")
        self._forget()
        self.holder = None
        self.tokens, self.rolled, self.evicted_at = tokens, rolled, evicted_at
        self.narrowed = True  # as it may have been when it was saved
        self.read_all()
        self.keep_logits(logits)


def append(parts: Mapping[Sequence, list[int]], *, outputs: Literal["last", "none", "all"] = "last") -> None:
    """Decode tokens at the end of sequences of one context, in one batch.

    Whatever ends it, an interruption too, every sequence knows afterwards which of its tokens are in the cache.

    Args:
        parts: new tokens of each sequence.
        outputs: of which tokens the logits are wanted; ``last``: of the last one of every sequence, in this order.

    Raises:
        KVError: the cache is full, or the computation failed.
    """
    context = next(iter(parts)).context
    tokens = [token for part in parts.values() for token in part]
    pos = np.concatenate([np.arange(s.position, s.position + len(part)) for s, part in parts.items()])
    seqs = np.repeat([s.seq for s in parts], [len(part) for part in parts.values()])
    for sequence, part in parts.items():
        sequence.keep_logits(None)
        if len(part) > FEW_TOKENS:
            sequence.read_all()
    try:
        context.decode(tokens, pos.astype(np.int32), seqs.astype(np.int32), outputs=outputs)
    except BaseException:
        for sequence, part in parts.items():
            n_more = context.n_seen(sequence.seq) - sequence.position
            if n_more < 0:
                sequence.release()  # a recurrent state was lost, and all with it
            sequence.tokens += part[: max(n_more, 0)]
        raise
    for i, (sequence, part) in enumerate(parts.items()):
        sequence.tokens += part
        if outputs == "last":
            sequence._output, sequence._n_outputs = (context.n_decoded, i - len(parts)), len(parts)
