"""A run without weights: the engine, the policy and the page tables work as ever, and nothing is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np

from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.evictor import Bounds, Event, Evictor
from kvlocal.engine.sequence import Sequence, append
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import PAGE_SLOTS
from kvlocal.native.model import Model

_PAGES = 2 * PAGE_SLOTS  # the largest kivi group fills two

_TABLE = 65_521
"""Length of the tables. A prime, so that positions of different heads walk through the table out of step."""


_TURNS = 6
"""How often all of a budget is read anew until a sequence is taken to hold what it ever will."""

_LONG = 16_384
"""Tokens of a prompt from which on the bytes of a run are taken to grow evenly with every further one."""

_TIMES = 8
"""How many times a budget such a prompt has at least: tokens are stored in an eighth of f16 at most."""


class MadeUpCache(PagedCache):
    """A cache whose pages hold nothing; what policies look at is made up.

    Scores have the shape of attention: they belong to positions, so that what one eviction kept is likely to be kept by
    the next; they are heavy-tailed, in some heads more than in others, so that heads that compete get unequal shares;
    they fall with distance, and the first tokens stand out, which matters to a storage that leaves sinks and tail in
    f16. Its bytes at the end are then those of real text within a few percent (tests/real).
    """

    def window_scores(self, seq: int, layer: int, n_queries: int = 0, rms: bool = False) -> np.ndarray:
        return self._by_position(seq, layer, lambda age: 1 / (1 + age / 8))

    def mass(self, seq: int, layer: int) -> np.ndarray:
        # the sum of the above over all queries so far
        return self._by_position(seq, layer, lambda age: np.log1p(age / 8))

    def keys_values(self, seq: int, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        at = self.positions(seq, layer)[head]
        shape = self.layers[layer]
        start = _start(seq, layer, head)
        return _rows(start + at, shape.d_k), _rows(start + 1 + at, shape.d_v)

    def value_norms(self, seq: int, layer: int) -> list[np.ndarray]:
        return [
            (0.5 + _uniform()[(_start(seq, layer, head) + at) % _TABLE]).astype(np.float32)
            for head, at in enumerate(self.positions(seq, layer))
        ]

    def queries(self, seq: int, layer: int, n_queries: int) -> np.ndarray:
        shape = self.layers[layer]
        n = min(n_queries, int(self.seq_stats(seq).n_seen))
        return _rows(_start(seq, layer) + np.arange(n * shape.n_head), shape.d_k).reshape(n, shape.n_head, shape.d_k)

    def rotate(self, layer: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.array(rows, np.float32, order="C")

    def _by_position(self, seq: int, layer: int, of_age: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        positions = self.positions(seq, layer)
        shape = self.layers[layer]
        n_seen = int(self.seq_stats(seq).n_seen)
        out = np.zeros((shape.n_head, max(map(len, positions))), np.float32)
        for head in range(shape.n_head):
            at = positions[head * shape.n_head_kv // shape.n_head]
            start = _start(seq, layer, head)
            tail = 0.25 + 0.75 * _uniform()[start % _TABLE]
            trend = np.where(at < 4, 4, 1) * of_age(n_seen - at)
            out[head, : len(at)] = _uniform()[(start + at) % _TABLE] ** -tail * trend
        return out


class RecentCache(MadeUpCache):
    """For policies that ask which query needed a slot last: the latest did, so that as much is kept as can be."""

    def mass(self, seq: int, layer: int) -> np.ndarray:
        lengths = self.lengths(seq, layer)
        shape = self.layers[layer]
        seen = np.float32(self.seq_stats(seq).n_seen)
        held = np.repeat(lengths, shape.n_head // shape.n_head_kv)
        return np.where(np.arange(int(lengths.max())) < held[:, None], seen, np.float32(0))


class Rehearsal(Engine):
    """An engine over a model without weights; the model stays open when it is closed.

    Attributes:
        peak_table_bytes: the most that page tables, positions and what stands for units took when an eviction was due,
            or at the end.
    """

    def __init__(self, config: EngineConfig, model: Model) -> None:
        assert model.no_alloc
        self.peak_table_bytes = 0
        self.stay = False
        super().__init__(config, model)

    def __enter__(self) -> Rehearsal:
        return self

    def _unload(self) -> None:
        """The model belongs to whoever made it."""

    def _memory_bytes(self) -> None:
        return None

    def _open(self, config: EngineConfig) -> None:
        super()._open(config)
        if self.cache is not None:
            kind = RecentCache if self.policy.mass == "last" else MadeUpCache
            self.context.cache = kind(self.context.handle, self.cache.formats, self.cache.kivi_group)

    def _make_evictor(self, config: EngineConfig) -> Evictor:
        return _Watched(self.context, self._bounds(config), self)

    def note_tables(self) -> None:
        stats = self.context.stats()
        self.peak_table_bytes = max(self.peak_table_bytes, int(stats.table_bytes + stats.index_bytes))

    def again(self) -> None:
        """Be as if nothing had been played."""
        self.reset()
        self.peak_table_bytes = 0

    def play(self, n_prompt: int, n_generate: int, *, to_peak: bool = False) -> None:
        """Every sequence reads a prompt of so many tokens, one after the other; then all of them grow together.

        ``to_peak``: no further than to the peak. llama.cpp's own cache has it from the start; an exact run where the
        last prompt has been read and is to be evicted or demoted, if what is generated takes less than that frees.

        Raises:
            UsageError: a prompt does not fit into the context, or the budget is too small.
            KVError: the cache is full.
        """
        last = self.config.n_seq_max - 1
        exact = self.config.prefill == "exact"
        for seq in range(last + 1):
            if to_peak and self.cache is None:
                return
            self.stay = to_peak and exact and seq == last
            self.prefill([0] * n_prompt, sequence=self.sequences[seq])
        if self.stay:
            if self._left_of(last) + n_generate * self.config.n_seq_max <= n_prompt:
                return
            self.stay = False
            self.evict(self.sequences[last])
        for _ in range(n_generate):
            for sequence in self.sequences:
                if len(sequence.tokens) < self.n_max:
                    append({sequence: [0]})
                    self.evictor.after(sequence, "step")
        self.note_tables()

    def _left_of(self, seq: int) -> float:
        """What is left of a prompt once it has been evicted and demoted, about, as f16 tokens per head."""
        assert self.cache is not None
        storage = self.config.storage
        f16 = storage.sink + max(storage.tail, self.policy.n_window) if storage.demotes else 0
        return (
            f16
            + self.budget_tokens(self.sequences[seq]) * storage.bytes_per_token(self.cache) / self.cache.bytes_per_token
        )

    def enough(self, n_prompt: int) -> int:
        """Tokens of a prompt after which nothing new happens: those that are read in chunks under a budget that does
        not grow hold the same from then on. It ends in as long a chunk as the prompt does."""
        config = self.config
        if not self.reader.chunks() or config.budget.unit == "percent":
            return n_prompt
        turns = _TURNS * (self.budget_tokens() + config.chunk) // config.chunk
        return min(n_prompt, turns * config.chunk + n_prompt % config.chunk)

    def lengths(self, n_prompt: int, n_generate: int) -> tuple[int, ...]:
        """Prompts to play instead of one of ``n_prompt`` tokens: itself, or two that are shorter and tell what a longer
        one takes. They end as it does: in as full a page, as long a chunk.

        Both are long beside the budget, what stays in f16 whatever happens, and what is generated.
        """
        config = self.config
        step = math.lcm(_PAGES, config.chunk)
        fixed = 0 if config.budget.unit == "percent" else self.budget_tokens()
        fixed += config.storage.sink + config.storage.tail + config.chunk + config.guide + self.policy.n_window
        least = max(_LONG // 2, _TIMES * (fixed + n_generate * config.n_seq_max))
        first = -(-least // step) * step + n_prompt % step
        second = first + -(-_LONG // 2 // step) * step
        return (first, second) if second < n_prompt else (n_prompt,)


def grown(first: int, second: int, lengths: tuple[int, ...], n: int) -> int:
    """Bytes at ``n`` tokens on the line through those at two :meth:`Rehearsal.lengths`."""
    return second + (second - first) * (n - lengths[1]) // (lengths[1] - lengths[0])


class _Watched(Evictor):
    """Notes the page tables when an eviction is due, and leaves it out while the rehearsal stays at its peak."""

    def __init__(self, context: Context, bounds: Bounds, rehearsal: Rehearsal) -> None:
        super().__init__(context, bounds)
        self._rehearsal = rehearsal

    def after(self, sequence: Sequence, event: Event, *, room: int | None = None, guide: Iterable[int] = ()) -> bool:
        if event != "step" or (sequence.look_at is not None and len(sequence.tokens) > sequence.look_at):
            self._rehearsal.note_tables()
            if self._rehearsal.stay:
                return False
        return super().after(sequence, event, room=room, guide=guide)


def _start(seq: int, layer: int, head: int = 0) -> int:
    """Where a head begins in the table."""
    return 7919 * seq + 104_729 * layer + 1299 * head


@functools.cache
def _uniform() -> np.ndarray:
    """float64 ``[_TABLE]`` in (0, 1)."""
    return 1 - np.random.default_rng(0).random(_TABLE)


@functools.cache
def _normal() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(_TABLE).astype(np.float32)


def _rows(at: np.ndarray, d: int) -> np.ndarray:
    """Normal values, float32 ``[len(at), d]``: a row belongs to its place."""
    return _normal()[(at[:, None].astype(np.int64) * 31 + np.arange(d)) % _TABLE]
