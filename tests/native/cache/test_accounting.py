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
PAGE_BYTES = 32 * SLOT_BYTES


class PagedCacheMachine(RuleBasedStateMachine):
    """Three sequences, one layer, two KV heads; ``held[seq][head]`` are the positions that must be there."""

    model: Model

    @initialize()
    def start(self) -> None:
        self.context = Context(self.model, ContextConfig(n_ctx=512, n_seq_max=3, n_threads=1))
        assert self.context.cache is not None
        self.cache = self.context.cache
        self.held: list[list[list[int]]] = [[[], []] for _ in range(3)]
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

    @rule(src=SEQS, dst=SEQS)
    def branch(self, src: int, dst: int) -> None:
        self.context.branch(src, dst)
        self.held[dst] = [list(head) for head in self.held[src]]
        self.n_seen[dst] = self.n_seen[src]

    @rule(seq=SEQS, share=st.floats(0, 1))
    def truncate(self, seq: int, share: float) -> None:
        n = int(share * self.n_seen[seq])
        self.context.truncate(seq, n)
        self.held[seq] = [[p for p in head if p < n] for head in self.held[seq]]
        self.n_seen[seq] = n

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
        slots = sum(len(head) for heads in self.held for head in heads)
        pages = sum(-(-len(head) // 32) for heads in self.held for head in heads)
        assert stats.used_bytes <= stats.allocated_bytes <= stats.peak_bytes
        assert stats.peak_bytes >= self.peak
        assert stats.used_bytes <= slots * SLOT_BYTES, "shared pages count once"
        assert stats.allocated_bytes <= pages * PAGE_BYTES
        if sum(n > 0 for n in self.n_seen) <= 1:
            assert stats.used_bytes == slots * SLOT_BYTES
            assert stats.allocated_bytes == pages * PAGE_BYTES
        assert stats.full_bytes == sum(self.n_seen) * 2 * SLOT_BYTES


@pytest.mark.filterwarnings("ignore")
def test_any_order_of_operations(open_model: OpenModel) -> None:
    model = open_model("llama", n_layer=1, n_head=2, n_head_kv=2, head_dim=64, n_ff=32)

    class Machine(PagedCacheMachine):
        pass

    Machine.model = model
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
