"""What the next tokens of sequences read: units of the text are kept up, chosen from, and brought back from disk."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvlocal.engine.report import Archive as ArchiveReport
from kvlocal.engine.report import Reads
from kvlocal.engine.sequence import Sequence, append
from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.retrieval import Retrieval, Retrieved
from kvlocal.retrieval.registry import UNITS
from kvlocal.retrieval.retriever import Retriever
from kvlocal.settings import RECALL_BUDGET
from kvlocal.storage.archive import ASKING, Archive

REREAD = 256
"""Most tokens of a question that are read once more over what it has brought back."""


class Retrieving:
    """Lets a retriever choose what sequences of a context read, and an archive keep what they lose.

    Attributes:
        retriever: says what every token reads; ``None``: all that is held, and what a turn has brought back beside it.
    """

    def __init__(self, context: Context, retriever: Retriever | None, archive: Archive | None = None) -> None:
        self.context = context
        self.retriever = retriever
        self.archive = archive
        self._cut = retriever or UNITS
        budget = archive.budget if archive else RECALL_BUDGET.default
        self._turn = self._asked = Retrieval(budget, "none", 0, 1, min_unit=1, per_head=True, recall="turn")
        if retriever is not None:
            self._asked = asked = replace(retriever.retrieval(), recall=archive.recall if archive else "off")
            room = max(asked.budget - asked.sink - asked.recent, 1)
            self._turn = replace(self._turn, budget=room, summary=asked.summary)
        self._vocabulary = _Vocabulary(context)
        self._folder: Path | None = archive.open_folder() if archive is not None else None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._n_steps = self._index_bytes = self._n_turns = self._read_bytes = 0
        self._read = self._wanted = self._kept = self._seconds = 0.0
        self._recalled = self._missed = 0.0

    def report(self) -> Reads | None:
        """Of all steps since :meth:`reset`; ``None``: every token reads all that is held."""
        if self.retriever is None:
            return None
        read = self._read / max(self._n_steps, 1)
        kept = self._kept / self._wanted if self._wanted else None
        return Reads(str(self.retriever), read, kept, self._index_bytes, self._seconds)

    def archive_report(self, sequence: Sequence) -> ArchiveReport | None:
        """What a sequence has on disk, and what came back of all sequences since :meth:`reset`; ``None``: nothing."""
        if self.archive is None:
            return None
        found = self._cache.archived(sequence.seq)
        n = max(self._n_turns, 1)
        return ArchiveReport(
            self.archive.recall,
            int(self.context.stats().archive_bytes),
            found.n_units,
            found.n_lost,
            self._recalled / n,
            self._missed / n,
            self._read_bytes,
            found.error,
        )

    @property
    def _cache(self) -> PagedCache:
        assert self.context.cache is not None
        return self.context.cache

    def index(self, sequence: Sequence) -> None:
        """Take up new tokens, and write them to the archive, before something is evicted or demoted of them."""
        ends = self._close(sequence)
        n = len(sequence.tokens)
        if self.archive is not None and n > (sequence.units[-1] if sequence.units else 0):
            # what is open may be evicted too: it ends here
            sequence.units.append(n)
            ends.append(n)
        self._cache.index(sequence.seq, self._asked, ends)

    def choose(self, sequence: Sequence) -> Retrieved | None:
        """Choose what the next token reads; ``None``: all that is held."""
        if self.retriever is None:
            return None
        step = self._cache.retrieve(sequence.seq, self._asked, self._close(sequence))
        sequence.narrowed = True
        self._n_steps += 1
        self._index_bytes = step.index_bytes
        self._read += step.n_read
        self._wanted += step.n_wanted
        self._kept += step.n_kept
        self._seconds += step.us / 1e6
        self._note(step)
        return step

    def recall(self, sequence: Sequence, begin: int) -> bool:
        """Bring back what the tokens from ``begin`` on ask for, and read them once more over it.

        Returns:
            Whether something was brought back that had not been there.

        Raises:
            KVError: as :func:`~kvlocal.engine.sequence.append`; the sequence is empty if it could not be cut.
        """
        if self.archive is None or self.archive.recall == "off" or not sequence.units:
            return False
        n = len(sequence.tokens)
        asked = replace(self._turn, n_queries=min(n - begin, ASKING))
        step = self._cache.retrieve(sequence.seq, asked, self._close(sequence))
        self._note(step)
        left = max(n - REREAD, begin, sequence.evicted_at)
        if step.n_recalled == 0 or left == n or sequence.reach(left) != left:
            return False
        again, holder = sequence.tokens[left:], sequence.holder
        if not sequence.cut(left):
            raise KVError("The question cannot be read once more: there is no room to cut it off; use a larger -c.")
        sequence.holder = holder
        append({sequence: again})
        return True

    def adopt(self, sequence: Sequence, path: Path, tag: str, table: np.ndarray) -> None:
        """Take the saved archive of a sequence that was loaded.

        Raises:
            KVError: it cannot be read, or is another one's.
        """
        self._open(sequence)
        self._cache.load_archive(sequence.seq, path, tag, table)
        sequence.units = table[:, 1].tolist()
        sequence.archive_file = path

    def _open(self, sequence: Sequence) -> None:
        if self._folder is not None and self.archive is not None and not sequence.archived:
            self._cache.archive_to(sequence.seq, self._folder, self.archive.storage)
            sequence.archived = True

    def _note(self, step: Retrieved) -> None:
        self._n_turns += 1
        self._recalled += step.n_recalled
        self._missed += step.n_missed
        self._read_bytes += step.read_bytes

    def _close(self, sequence: Sequence) -> list[int]:
        """The units that have closed since the last call."""
        self._open(sequence)
        begin = sequence.units[-1] if sequence.units else 0
        ends = [begin + end for end in self._cut.ends(sequence.tokens[begin:], self._vocabulary)]
        sequence.units += ends
        return ends


class _Vocabulary:
    """What tokens stand for, remembered."""

    def __init__(self, context: Context) -> None:
        model = context.model
        self.piece = functools.cache(lambda token: model.piece(token).decode("utf-8", "replace"))
        self.entry = functools.cache(model.entry)
