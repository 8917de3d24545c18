"""Any order of operations: what the cache says it holds is what a plain model of it holds, to the byte."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenModel, random_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

SEQS = st.integers(0, 2)
SLOT_BYTES = 64 * 2 * 2
Q8_BYTES = 64 * 2 * 34 // 32


class PagedCacheMachine(RuleBasedStateMachine):
    """Three sequences, one layer, two KV heads; ``held[seq][head]`` are the positions that must be there."""

    model: Model
    formats: tuple[str, ...] = ("q8",)

    @initialize()
    def start(self) -> None:
        self.context = Context(self.model, ContextConfig(512, n_seq_max=3, n_threads=1, formats=self.formats))
        assert self.context.cache is not None
        self.cache = self.context.cache
        self.held: list[list[list[int]]] = [[[], []] for _ in range(3)]
        self.in_q8: list[list[set[int]]] = [[set(), set()] for _ in range(3)]
        self.n_seen = [0, 0, 0]
        self.peak = 0

    def teardown(self) -> None:
        if hasattr(self, "context"):
            for seq in range(3):
                self.context.truncate(seq, 0)
            assert self.context.stats().used_bytes == self.context.stats().allocated_bytes == 0
            self.context.close()

    @rule(seq=SEQS, n=st.integers(1, 70))
    def append(self, seq: int, n: int) -> None:
        if self.n_seen[seq] + n > 500:
            return
        self.context.decode(random_tokens(self.model, n), self.n_seen[seq], seq)
        for head in self.held[seq]:
            head.extend(range(self.n_seen[seq], self.n_seen[seq] + n))
        self.n_seen[seq] += n

    @rule(seq=SEQS, data=st.data())
    def keep(self, seq: int, data: st.DataObject) -> None:
        if not all(self.held[seq]):
            return
        slots = []
        for head in self.held[seq]:
            rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
            count = data.draw(st.integers(1, len(head)))
            slots.append(np.sort(rng.choice(len(head), count, replace=False)))
        self.cache.keep(seq, 0, slots)
        self.held[seq] = [[head[i] for i in s] for head, s in zip(self.held[seq], slots, strict=True)]

    @rule(seq=SEQS, data=st.data())
    def demote(self, seq: int, data: st.DataObject) -> None:
        if not self.formats:
            return
        slots = []
        for head, in_q8 in zip(self.held[seq], self.in_q8[seq], strict=True):
            rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
            slots.append(np.sort(rng.choice(len(head), data.draw(st.integers(0, len(head))), replace=False)))
            in_q8.update(head[i] for i in slots[-1])
        self.cache.demote(seq, 0, slots, "q8")

    @rule(src=SEQS, dst=SEQS)
    def branch(self, src: int, dst: int) -> None:
        self.context.branch(src, dst)
        self.held[dst] = [list(head) for head in self.held[src]]
        self.in_q8[dst] = [set(head) for head in self.in_q8[src]]
        self.n_seen[dst] = self.n_seen[src]

    @rule(seq=SEQS, share=st.floats(0, 1))
    def truncate(self, seq: int, share: float) -> None:
        n = int(share * self.n_seen[seq])
        self.context.truncate(seq, n)
        self.held[seq] = [[p for p in head if p < n] for head in self.held[seq]]
        self.in_q8[seq] = [{p for p in head if p < n} for head in self.in_q8[seq]]
        self.n_seen[seq] = n

    def bytes_of(self, seq: int) -> tuple[int, int]:
        """Of the slots held, and of the pages that they need."""
        used = pages = 0
        for head, in_q8 in zip(self.held[seq], self.in_q8[seq], strict=True):
            n_q8 = len(in_q8.intersection(head))
            for n, slot_bytes in ((n_q8, Q8_BYTES), (len(head) - n_q8, SLOT_BYTES)):
                used += n * slot_bytes
                pages += -(-n // 32) * 32 * slot_bytes
        return used, pages

    @invariant()
    def positions_match(self) -> None:
        if not hasattr(self, "cache"):
            return
        for seq in range(3):
            assert self.context.n_seen(seq) == self.n_seen[seq]
            for got, want in zip(self.cache.positions(seq, 0), self.held[seq], strict=True):
                assert got.tolist() == want

    @invariant()
    def bytes_match(self) -> None:
        if not hasattr(self, "cache"):
            return
        stats = self.context.stats()
        self.peak = max(self.peak, stats.allocated_bytes)
        of = [self.bytes_of(seq) for seq in range(3)]
        for seq in range(3):
            told = self.cache.seq_stats(seq)
            assert (told.used_bytes, told.page_bytes) == of[seq]
            assert told.n_slots == sum(map(len, self.held[seq]))
        used, pages = (sum(bytes_of) for bytes_of in zip(*of, strict=True))
        assert stats.used_bytes <= stats.allocated_bytes <= stats.peak_bytes
        assert stats.peak_bytes >= self.peak
        assert max(own for own, _ in of) <= stats.used_bytes <= used, "shared pages count once"
        assert max(own for _, own in of) <= stats.allocated_bytes <= pages
        if sum(n > 0 for n in self.n_seen) <= 1:
            assert stats.used_bytes == used
            assert stats.allocated_bytes == pages
        assert stats.full_bytes == sum(self.n_seen) * 2 * SLOT_BYTES

    @invariant()
    def what_is_shared_is_counted_again_when_it_is_let_go(self) -> None:
        """A branch held and dropped again changes nothing: afterwards everything has been counted from the tables."""
        if not hasattr(self, "cache") or any(self.n_seen[1:]):
            return
        before = self.context.stats().used_bytes
        self.context.branch(0, 1)
        assert self.context.stats().used_bytes == before
        self.context.truncate(1, 0)
        assert self.context.stats().used_bytes == before


@pytest.mark.filterwarnings("ignore")
def test_any_order_of_operations(has_kernels: bool, open_model: OpenModel) -> None:
    model = open_model("llama", n_layer=1, n_head=2, n_head_kv=2, head_dim=64, n_ff=32)

    class Machine(PagedCacheMachine):
        pass

    Machine.model = model
    if not has_kernels:
        Machine.formats = ()  # demotions are left out
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
