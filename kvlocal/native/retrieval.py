"""What is asked of a retrieval, and what it tells of a step."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Literal

from kvlocal.native.structs import KvlRetrieval

Recall = Literal["off", "step", "turn"]
RECALLS: tuple[Recall, ...] = ("off", "step", "turn")
"""In the order of ``kvl_recall``."""

ArchiveFormat = Literal["f16", "q8"]
ARCHIVE_FORMATS: tuple[ArchiveFormat, ...] = ("f16", "q8")
"""In the order of ``kvl_archive_format``."""

Summary = Literal["none", "mean", "bounds", "attention"]
SUMMARIES: tuple[Summary, ...] = ("none", "mean", "bounds", "attention")
"""In the order of ``kvl_summary``."""


@dataclass(frozen=True)
class Retrieval:
    """How a part of a sequence is read.

    Attributes:
        budget: tokens per head that a token reads, sink and recent included, besides the unit that is open.
        summary: what stands for the keys of a unit: their ``mean``, their ``bounds`` per channel, or ``none``: the
            newest units are read; or ``attention``: nothing, those are read that get most of the attention of the
            newest ``n_queries`` queries, per token, chosen anew when a text was added.
        sink, recent: first and last tokens that are always read.
        n_queries: newest queries whose mean is compared; 0: those of the open unit.
        min_unit: no unit is looked for once fewer tokens are left of the budget.
        per_head: every KV head chooses for itself; else all of a layer together.
        partial: of the first unit that does not fit the beginning is read; else others that fit are.
        dense_layers: first layers that read everything.
        full_below: everything is read while the open unit has fewer tokens.
        drift: with ``n_queries`` 0, a layer chooses anew once the open unit has so much more queries, as a share.
        every: with ``attention``, tokens of an answer after which is chosen anew, 0: none.
        hysteresis: by how many standard deviations of the scores a unit must be better to take the place of one that
            was read in the last step.
        recall: what is brought back from the archive, exact: nothing; by ``step``, what of the units that are read is
            not held in f16; by ``turn``, beside all that is held, the units that get most of the attention of the
            newest ``n_queries`` queries over all that is archived, ``budget`` tokens that are not held in f16; they
            need no summary.
    """

    budget: int
    summary: Summary = "mean"
    sink: int = 32
    recent: int = 64
    n_queries: int = 0
    min_unit: int = 4
    per_head: bool = False
    partial: bool = False
    dense_layers: int = 0
    full_below: int = 0
    recall: Recall = "off"
    every: int = 0
    drift: float = 0.0
    hysteresis: float = 0.0

    @functools.cached_property
    def native(self) -> KvlRetrieval:
        """As the library takes it."""
        numbers = {"summary": SUMMARIES.index(self.summary), "recall": RECALLS.index(self.recall)}
        return KvlRetrieval(**asdict(self) | numbers)


@dataclass(frozen=True)
class Retrieved:
    """Of one step: closed units, bytes of what stands for them, microseconds that choosing took; tokens per head, mean
    over the layers, that the next token reads, that were chosen by score, and that of these were read before; whether
    everything is read. Of the archive: tokens per head that were brought back, tokens of the units read for it now, per
    layer, tokens per head that are not there (yet), bytes of those units."""

    n_units: int
    index_bytes: int
    us: int
    n_read: float
    n_wanted: float
    n_kept: float
    full: bool
    n_recalled: float = 0.0
    n_loaded: float = 0.0
    n_missed: float = 0.0
    read_bytes: int = 0


@dataclass(frozen=True)
class Archived:
    """The archive of a sequence: units written, units of these that cannot be read, bytes of the files that they lie
    in, and what went wrong last, a sentence, empty if nothing did."""

    n_units: int
    n_lost: int
    bytes: int
    error: str
