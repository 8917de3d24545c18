"""Contexts that compute nothing: they count slots, advance a clock and write down what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvlocal.engine import evictor
from kvlocal.measure import bench
from kvlocal.native.cache import Layer
from kvlocal.native.context import ContextConfig

LAYERS = [Layer(0, 4, 2, 8, 8, 1.0), Layer(1, 4, 2, 16, 8, 1.0)]
HEADS = [(layer, head) for layer in range(2) for head in range(2)]
TOKEN_BYTES = 2 * 2 * (8 + 8) + 2 * 2 * (16 + 8)  # heads x bytes x (d_k + d_v), of both layers
EVICT_S = 10.0
DEMOTE_S = 3.0


@dataclass
class Event:
    """``what``: decode, branch, evict, demote, truncate.

    Of ``decode``: the tokens' positions and the slots held before; of ``demote``: the first position that was not
    demoted yet, and how many.
    """

    lane: int
    what: str
    seq: int
    begin: int = 0
    n: int = 0
    held: int = 0
    outputs: str = ""


@dataclass
class World:
    """The clock, the diary and the contexts. A token of lane i takes ``unit(i)`` seconds."""

    unit: Callable[[int], float] = lambda _lane: 1.0
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    contexts: list[FakeContext] = field(default_factory=list)
    waited: int = 0

    def clock(self) -> float:
        return self.now

    def open_context(self, _model: Any, config: ContextConfig) -> Any:
        self.contexts.append(FakeContext(self, len(self.contexts), config))
        return self.contexts[-1]

    def of(self, what: str, lane: int | None = None) -> list[Event]:
        return [event for event in self.events if event.what == what and lane in (None, event.lane)]

    def evict(self, sequence: Any, _policy: Any, budget: int, _read: Any = None, **_room: int) -> bool:
        self.now += EVICT_S
        sequence.context.evict(sequence.seq, budget)
        sequence.evicted_at = len(sequence.tokens)
        return True


class FakeModel:
    """Tokens below ``n_special`` are control tokens, the last one ends a text."""

    name = "fake"
    n_ctx_train = 64
    vocab = None

    def __init__(self, world: World | None = None, n_vocab: int = 100, n_special: int = 3) -> None:
        self.n_vocab = n_vocab
        self.checked = 0
        self.llama = SimpleNamespace(
            llama_vocab_is_control=lambda _vocab, token: token < n_special,
            llama_synchronize=lambda _handle: world and setattr(world, "waited", world.waited + 1),
        )

    def is_end(self, token: int) -> bool:
        return token == self.n_vocab - 1

    def check_paged(self) -> None:
        self.checked += 1


class FakeContext:
    """Holds the positions of every sequence; all heads hold the same, save that a paged one can be evicted."""

    handle = "handle"
    n_decoded = 0

    def __init__(self, world: World, lane: int, config: ContextConfig) -> None:
        self.world, self.lane, self.config = world, lane, config
        self.model = FakeModel(world)
        self.slots: list[list[int]] = [[] for _ in range(config.n_seq_max)]
        self.demoted: list[set[int]] = [set() for _ in range(config.n_seq_max)]
        self.peak = 0
        self.closed = False
        self.cache = FakeCache(self) if config.paged else None

    def close(self) -> None:
        self.closed = True

    @property
    def allocated(self) -> int:
        """Bytes; a branch shares what it has in common with sequence 0."""
        return len(set().union(*map(set, self.slots))) * TOKEN_BYTES

    def note(self, what: str, seq: int, **values: Any) -> None:
        self.peak = max(self.peak, self.allocated)
        self.world.events.append(Event(self.lane, what, seq, **values))

    def decode(self, tokens: Sequence[int], pos: np.ndarray, seq: np.ndarray, *, outputs: str = "last") -> None:
        positions, seqs = pos, seq
        pos, seq = int(pos[0]), int(seq[0])
        assert (positions == np.arange(pos, pos + len(tokens))).all() and (seqs == seq).all()
        self.n_decoded += 1
        held = self.slots[seq]
        assert pos == (held[-1] + 1 if held else 0), "a gap between the positions"
        assert len(tokens) <= self.config.n_batch and pos + len(tokens) <= self.config.n_ctx
        before = len(held)
        held.extend(range(pos, pos + len(tokens)))
        self.world.now += len(tokens) * self.world.unit(self.lane)
        self.note("decode", seq, begin=pos, n=len(tokens), held=before, outputs=outputs)

    def n_seen(self, seq: int) -> int:
        return self.slots[seq][-1] + 1 if self.slots[seq] else 0

    def logits(self, n: int = 1) -> np.ndarray:
        self.note("logits", 0)
        return np.zeros((n, 100), np.float32)

    def reach(self, seq: int, n: int) -> int:
        return n

    def mark(self, seq: int) -> None:
        pass

    def truncate(self, seq: int, n: int) -> bool:
        self.slots[seq] = [pos for pos in self.slots[seq] if pos < n]
        self.demoted[seq] &= set(self.slots[seq])
        self.note("truncate", seq, begin=n)
        return True

    def branch(self, src: int, dst: int) -> None:
        self.slots[dst] = list(self.slots[src])
        self.demoted[dst] = set(self.demoted[src])
        self.note("branch", dst)

    def evict(self, seq: int, budget: int) -> None:
        held = self.slots[seq]
        self.note("evict", seq, held=len(held), n=budget)
        self.slots[seq] = held[max(len(held) - budget, 0) :]
        self.demoted[seq] &= set(self.slots[seq])

    def stats(self) -> Any:
        seen = self.slots[0][-1] + 1 if self.slots[0] else 0
        return SimpleNamespace(
            used_bytes=len(self.slots[0]) * TOKEN_BYTES,
            allocated_bytes=self.allocated,
            peak_bytes=self.peak,
            full_bytes=seen * TOKEN_BYTES,
        )


class FakeCache:
    """A demoted token takes a quarter of the bytes."""

    layers = LAYERS
    bytes_per_token = TOKEN_BYTES
    fixed_bytes = 0

    def __init__(self, context: FakeContext) -> None:
        self.context = context

    def positions(self, seq: int, layer: int) -> list[np.ndarray]:
        return [np.array(self.context.slots[seq], np.int32) for _ in range(self.layers[layer].n_head_kv)]

    def centre(self, _seq: int, _layer: int, _first: int, _end: int, n_least: int) -> int:
        return n_least  # there are no keys to take a mean of

    def demote_due(self, seq: int, layer: int, positions: np.ndarray, storage: str, n_most: int) -> int:
        assert storage in self.context.config.formats and n_most == 0
        held, demoted = self.context.slots[seq], self.context.demoted[seq]
        new = sorted(set(held) & set(positions.tolist()) - demoted)
        if layer == len(self.layers) - 1:
            demoted |= set(new)
            self.context.world.now += DEMOTE_S
            self.context.note("demote", seq, begin=new[0] if new else -1, n=len(new))
        return len(new)

    def held(self, seq: int) -> list[np.ndarray]:
        n = len(self.context.slots[seq])
        return [np.full(layer.n_head_kv, n, np.int32) for layer in self.layers]

    def seq_stats(self, seq: int) -> Any:
        slots = self.context.slots[seq]
        seen = slots[-1] + 1 if slots else 0
        n_heads = len(HEADS)
        n_demoted = len(self.context.demoted[seq])
        used = (len(slots) - n_demoted) * TOKEN_BYTES + n_demoted * TOKEN_BYTES // 4
        return SimpleNamespace(
            n_seen=seen,
            n_slots=len(slots) * n_heads,
            n_heads=n_heads,
            used_bytes=used,
            full_bytes=seen * TOKEN_BYTES,
        )

    def mean_slots(self, seq: int) -> int:
        return len(self.context.slots[seq])

    def reset_peak(self) -> None:
        self.context.peak = self.context.allocated


def install(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(evictor, "evict", world.evict)


def run(world: World, config: bench.BenchConfig, on_step: Any = lambda _step: None) -> Iterator[bench.Result]:
    return bench.bench(
        FakeModel(world),  # type: ignore[arg-type]
        config,
        on_step,
        clock=world.clock,
        open_context=world.open_context,
    )
