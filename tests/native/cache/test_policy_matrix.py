"""Every policy over the real cache: number of sequences x GQA x how the tokens come x size of the budget, pairwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import within

from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import Sequence
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.params import declared_rules
from kvlocal.policies import REGISTRY, Policy, make_policy
from kvlocal.policies.buzz import Buzz
from kvlocal.policies.expected_attention import mean_rotation

POLICIES = [name for name, cls in REGISTRY.items() if cls.evicts and name != "ladder"]  # which counts bytes
SMALL = {"window": 8, "chunk": 4, "queries": 16, "n_future": 16, "sink": 2}
"""So that tiny budgets have room for what is always kept."""

ARRIVALS = ("prompt", "chunks", "tokens")
GROUPS = (1, 3, 8)
BUDGETS = ("least", "quarter", "all")
N_SEQS = (1, 3, 3)
ROWS = [
    (ARRIVALS[i], GROUPS[j], BUDGETS[(i + j) % 3], N_SEQS[(i + 2 * j) % 3])
    for i, j in itertools.product(range(3), range(3))
]
"""Any two levels of any two columns meet in some row."""

N_LAYER, N_HEAD_KV, HEAD_DIM = 2, 2, 64
SLOT_BYTES = 2 * HEAD_DIM * 2
N_TOKENS = 300
EVICT_EVERY = 8

Held = list[list[np.ndarray]]
"""Positions per layer and KV head."""


class Run:
    """Sequences of one context, evicted one by one; what must hold is checked at every eviction."""

    def __init__(self, context: Context, policy: Policy, budget: int, n_seq: int) -> None:
        assert context.cache is not None
        self.context, self.cache = context, context.cache
        self.policy, self.budget, self.n_seq = policy, budget, n_seq
        self.n_seen = [0] * n_seq
        self.n_evictions = 0
        self.sequences = [Sequence(context, seq) for seq in range(n_seq)]
        self.rng = np.random.default_rng(0)

    def append(self, counts: list[int]) -> None:
        """So many new tokens for every sequence, in one batch; everything held before is held after."""
        before = [held(self.cache, seq) for seq in range(self.n_seq)]
        seqs = np.repeat(np.arange(self.n_seq), counts)
        at = np.concatenate([n + np.arange(c) for n, c in zip(self.n_seen, counts, strict=True)])
        self.context.decode(self.rng.integers(3, self.context.model.n_vocab, len(at)), at, seqs)
        for seq, n_new in enumerate(counts):
            new = np.arange(self.n_seen[seq], self.n_seen[seq] + n_new)
            assert_same(held(self.cache, seq), [[np.r_[p, new] for p in heads] for heads in before[seq]])
            self.n_seen[seq] += n_new
            assert self.context.n_seen(seq) == self.n_seen[seq]

    def evict(self, seq: int) -> None:
        """Evict a sequence until it is no longer due: one eviction, unless the policy approaches its size in steps."""
        before = held(self.cache, seq)
        others = {other: (held(self.cache, other), self.stored(other)) for other in range(self.n_seq) if other != seq}
        is_due = self.policy.due(float(np.mean([len(p) for heads in before for p in heads])), self.budget)
        n = 0
        sequence = self.sequences[seq]
        sequence.tokens = [-1] * self.n_seen[seq]
        while evict(sequence, self.policy, self.budget):
            n += 1
            assert n == 1 or (isinstance(self.policy, Buzz) and n < 10)
        assert (n > 0) == is_due
        self.n_evictions += n
        after = held(self.cache, seq)
        if n:
            self.check_kept(seq, before, after)
        else:
            assert_same(after, before)
        for other, (positions, stored) in others.items():
            assert_same(held(self.cache, other), positions)
            for got, want in zip(self.stored(other), stored, strict=True):
                np.testing.assert_array_equal(got, want)
        self.check_bytes()

    def stored(self, seq: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one head."""
        return self.cache.keys_values(seq, seq % N_LAYER, seq % N_HEAD_KV)

    def check_kept(self, seq: int, before: Held, after: Held) -> None:
        sink, window = (getattr(self.policy, name, 0) for name in ("sink", "window"))
        for old, new in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
            assert len(new) >= 1 and (np.diff(new) > 0).all() and new[0] >= 0 and new[-1] < self.n_seen[seq]
            assert np.isin(new, old).all()
            assert np.isin(old[(old < sink) | (old >= self.n_seen[seq] - window)], new).all()
        were, are = ([sum(map(len, heads)) for heads in which] for which in (before, after))
        if isinstance(self.policy, Buzz):
            assert max(len(p) for heads in after for p in heads) <= self.policy.peak(self.budget)
        elif "pyramid" in self.policy.name:
            assert sum(are) == min(N_LAYER * N_HEAD_KV * self.budget, sum(were))
        else:
            assert are == [min(N_HEAD_KV * self.budget, n) for n in were]

    def check_bytes(self) -> None:
        slots = [sum(len(p) for heads in held(self.cache, seq) for p in heads) for seq in range(self.n_seq)]
        assert slots == [self.cache.seq_stats(seq).n_slots for seq in range(self.n_seq)]
        stats = self.cache.stats()
        assert stats.used_bytes == sum(slots) * SLOT_BYTES
        assert stats.used_bytes <= stats.allocated_bytes <= stats.peak_bytes


def held(cache: PagedCache, seq: int) -> Held:
    return [cache.positions(seq, layer) for layer in range(N_LAYER)]


def assert_same(one: Held, other: Held) -> None:
    for got, want in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        np.testing.assert_array_equal(got, want)


def small(name: str) -> Policy:
    rules = declared_rules(REGISTRY[name])
    # corm solves its number of queries for the budget by default, and then holds it like the others
    return make_policy(name, {k: v for k, v in SMALL.items() if k in rules and (name, k) != ("corm", "queries")})


def come(run: Run, arrival: str, n: int) -> None:
    """``n`` tokens for the longest sequence, a little less for the others, evictions where the arrival has them."""
    lengths = [n - 20 * seq for seq in range(run.n_seq)]
    if arrival == "prompt":
        run.append(lengths)
        for seq in range(run.n_seq):
            run.evict(seq)
    elif arrival == "chunks":
        while any(lengths):
            counts = [min(64, left) for left in lengths]
            run.append(counts)
            lengths = [left - count for left, count in zip(lengths, counts, strict=True)]
            for seq, count in enumerate(counts):
                if count:
                    run.evict(seq)
    else:
        run.append([left - 200 for left in lengths])
        for _ in range(200):
            run.append([1] * run.n_seq)
            for seq in range(run.n_seq):
                n_slots = run.cache.seq_stats(seq).n_slots
                if n_slots > N_LAYER * N_HEAD_KV * run.policy.limit(run.budget, EVICT_EVERY):
                    run.evict(seq)


@pytest.mark.parametrize(("arrival", "group", "size", "n_seq"), ROWS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_what_it_must_and_holds_its_budget(
    name: str, arrival: str, group: int, size: str, n_seq: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model(
        "llama", n_layer=N_LAYER, n_head=group * N_HEAD_KV, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM, n_ff=64
    )
    policy = small(name)
    budget = {"least": policy.min_budget, "quarter": N_TOKENS // 4, "all": N_TOKENS + 1}[size]
    context = open_context(model, n_seq_max=n_seq, n_window=policy.n_window, mass=policy.mass)
    run = Run(context, policy, budget, n_seq)
    come(run, arrival, N_TOKENS)
    assert (run.n_evictions > 0) == (size != "all")
    context.decode(random_tokens(model, n_seq), np.array(run.n_seen), np.arange(n_seq))
    assert np.isfinite(context.logits(n_seq)).all()
    for seq in range(n_seq):
        context.truncate(seq, 0)
        assert context.n_seen(seq) == 0 and context.cache is not None
        assert sum(len(p) for heads in held(context.cache, seq) for p in heads) == 0
    assert context.stats().used_bytes == context.stats().allocated_bytes == 0


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
def test_the_mean_rotation_that_expected_attention_composes(
    arch: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    """It turns sums by powers of two; here every position is turned to on its own."""
    cache = open_context(open_model(arch, n_layer=1, n_head=2, n_head_kv=2, head_dim=HEAD_DIM)).cache
    assert cache is not None
    units = np.eye(HEAD_DIM, dtype=np.float32)
    for first, n in ((3, 1), (1000, 37), (4000, 512)):
        turned = cache.rotate(0, np.tile(units, (n, 1)), np.repeat(np.arange(first, first + n), HEAD_DIM))
        want = turned.reshape(n, HEAD_DIM, HEAD_DIM).mean(axis=0, dtype=np.float64).T
        got = mean_rotation(lambda rows, at: cache.rotate(0, rows, at), HEAD_DIM, first, n)
        np.testing.assert_allclose(got, want, atol=3e-4)


def rolled(context: Context, policy: Policy, budget: int, texts: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Logits behind every sequence, all of them decoded in one batch, evicted and renumbered in turn."""
    sequences = {seq: Sequence(context, seq) for seq in texts}
    for first in range(0, min(map(len, texts.values())), 50):
        parts = {seq: text[first : first + 50] for seq, text in texts.items()}
        at = [context.n_seen(seq) + np.arange(len(part)) for seq, part in parts.items()]
        seqs = np.repeat(list(parts), [len(part) for part in parts.values()])
        context.decode(np.concatenate(list(parts.values())), np.concatenate(at), seqs)
        for seq, part in parts.items():
            sequences[seq].tokens = [*sequences[seq].tokens, *part.tolist()]
        logits = context.logits(len(texts))
        for sequence in sequences.values():
            while evict(sequence, policy, budget):
                assert context.n_seen(sequence.seq) == len(sequence.tokens) - sequence.rolled
    return dict(zip(texts, logits, strict=True))


@pytest.mark.parametrize("name", [name for name in POLICIES if "positions" in declared_rules(REGISTRY[name])])
def test_renumbered_sequences_do_not_disturb_each_other(
    name: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", n_layer=N_LAYER, n_head=6, n_head_kv=N_HEAD_KV, head_dim=HEAD_DIM, n_ff=64)
    rules = declared_rules(REGISTRY[name])
    policy = make_policy(name, {k: v for k, v in SMALL.items() if k in rules} | {"positions": "rolled"})
    budget = 80
    texts = {seq: random_tokens(model, 250, seq) for seq in range(3)}
    options = {"n_window": policy.n_window, "mass": policy.mass}
    together_in = open_context(model, n_seq_max=3, **options)
    together = rolled(together_in, policy, budget, texts)
    for seq, text in texts.items():
        alone_in = open_context(model, n_seq_max=3, **options)
        alone = rolled(alone_in, policy, budget, {seq: text})
        np.testing.assert_allclose(together[seq], alone[seq], atol=within(2e-3) * np.abs(alone[seq]).max())
        assert together_in.n_seen(seq) == alone_in.n_seen(seq) < 250, "renumbered"
        assert together_in.cache is not None and alone_in.cache is not None
        assert_same(held(together_in.cache, seq), held(alone_in.cache, seq))
        assert held(together_in.cache, seq)[0][0].tolist() == list(range(alone_in.n_seen(seq)))
