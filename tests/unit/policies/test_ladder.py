"""The ladder as a policy, on caches that exist only in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, layer_view

from kvlocal.errors import UsageError
from kvlocal.policies import CacheView, Decision, LayerView, make_policy
from kvlocal.policies.ladder import ERRORS
from kvlocal.policies.parts.allocation import top_counts

SEEDS = st.integers(0, 2**32 - 1)
SLOT_BYTES = {"f16": 256.0, "q8": 136.0, "q4": 72.0, "kv3": 44.0, "kv2": 36.0}
RUNGS = list(SLOT_BYTES)


class Cache:
    """Slots of some layers and how they are stored, kept and demoted as the cache does."""

    def __init__(self, seed: int, n_layer: int = 3, n_head: int = 2, n: int = 400, slot_bytes=None) -> None:
        self.rng = np.random.default_rng(seed)
        self.slot_bytes = slot_bytes or SLOT_BYTES
        self.n_seen = n
        self.positions = [[np.arange(n, dtype=np.int32)] * n_head for _ in range(n_layer)]
        self.formats = [[np.zeros(n, np.int32)] * n_head for _ in range(n_layer)]
        self.scores = [self.rng.exponential(size=(n_head, n)) ** 2 for _ in range(n_layer)]

    def view(self, budget: int) -> CacheView:
        return cache_view(budget, *(self.layer(i) for i in range(len(self.positions))))

    def layer(self, i: int) -> LayerView:
        positions, formats = self.positions[i], self.formats[i]
        scores = np.zeros((len(positions), max(map(len, positions))))
        for row, all_scores, p in zip(scores, self.scores[i], positions, strict=True):
            row[: len(p)] = all_scores[p]
        norms = [1 + np.abs(np.sin(p)) for p in positions]
        view = layer_view(scores, None, positions, self.n_seen, i)
        return replace(view, slot_bytes=self.slot_bytes, read_formats=lambda: formats, read_value_norms=lambda: norms)

    def apply(self, decisions: list[Decision]) -> None:
        for i, decision in enumerate(decisions):
            for h, kept in enumerate(decision.keep):
                p, f = self.positions[i][h][kept], self.formats[i][h][kept]
                for name, slots in decision.demote.items():
                    f[slots[h]] = np.maximum(f[slots[h]], RUNGS.index(name))
                    assert (f[slots[h]] == RUNGS.index(name)).all()  # nothing that stood lower is asked to rise
                self.positions[i][h], self.formats[i][h] = p, f

    def grow(self, n: int) -> None:
        new = np.arange(self.n_seen, self.n_seen + n, dtype=np.int32)
        self.n_seen += n
        for i, positions in enumerate(self.positions):
            self.positions[i] = [np.append(p, new) for p in positions]
            self.formats[i] = [np.append(f, np.zeros(n, np.int32)) for f in self.formats[i]]
            more = self.rng.exponential(size=(len(positions), n)) ** 2
            self.scores[i] = np.hstack([self.scores[i], more])

    def bytes(self) -> float:
        """Of whole pages."""
        sizes = list(self.slot_bytes.values())
        return sum(
            -(-int((f == r).sum()) // 32) * 32 * sizes[r]
            for formats in self.formats
            for f in formats
            for r in range(len(sizes))
        )

    @property
    def n_heads(self) -> int:
        return sum(map(len, self.positions))


def decide(cache: Cache, budget: int, **args: object) -> list[Decision]:
    return list(make_policy("ladder", args).decide(cache.view(budget)))


@given(seed=SEEDS, budget=st.integers(32, 500))
@settings(max_examples=50, deadline=None)
def test_whole_pages_fit_the_budget_and_hardly_anything_is_left_over(seed, budget):
    cache = Cache(seed)
    cache.apply(decide(cache, budget))
    most = budget * cache.n_heads * 256
    assert cache.bytes() <= most
    if budget < 390:
        assert cache.bytes() > most - 32 * 256


@given(seed=SEEDS, budget=st.integers(64, 300))
@settings(max_examples=20, deadline=None)
def test_over_twenty_evictions_precision_only_falls_and_the_budget_holds(seed, budget):
    cache = Cache(seed)
    for _ in range(20):
        before = [dict(zip(p.tolist(), f.tolist(), strict=True)) for p, f in _heads(cache)]
        cache.apply(decide(cache, budget))
        for old, (p, f) in zip(before, _heads(cache), strict=True):
            assert all(f[i] >= old[q] for i, q in enumerate(p.tolist()))
            ends = (p < 4) | (p >= cache.n_seen - 28)
            assert ends.sum() == 32 and (f[ends] == 0).all()
        assert cache.bytes() <= budget * cache.n_heads * 256
        cache.grow(32)


def _heads(cache: Cache) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        pair
        for positions, formats in zip(cache.positions, cache.formats, strict=True)
        for pair in zip(positions, formats, strict=True)
    ]


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_within_a_head_what_is_more_important_is_stored_no_worse(seed):
    cache = Cache(seed, n_layer=1)
    decisions = decide(cache, 120, norm="no", kernel=1, window=32)
    scores = cache.scores[0]
    cache.apply(decisions)
    for row, p, f in zip(scores, cache.positions[0], cache.formats[0], strict=True):
        weights = row[4 : 400 - 32]
        rung = np.full(400, len(RUNGS))
        rung[p] = f
        assert (np.diff(rung[4 : 400 - 32][np.argsort(-weights)]) >= 0).all()


@given(seed=SEEDS, budget=st.integers(2, 11))
@settings(max_examples=30, deadline=None)
def test_f16_only_and_a_price_per_layer_is_ada_on_pages(seed, budget):
    cache = Cache(seed, n_head=3, n=32 * 12 + 36 + 28)
    args = {"rungs": "f16", "price": "layer", "alpha": 0.0, "norm": "no", "power": 1.0, "kernel": 1, "window": 32}
    for layer, decision in enumerate(decide(cache, 32 * (2 + budget), **args)):
        # what competes after the 28 best, which fill up the pages of sinks and window
        best = np.sort(cache.scores[layer][:, 4:-32], axis=1)[:, ::-1][:, 28:]
        pages = best.reshape(3, 12, 32).sum(axis=2)
        expected = 64 + 32 * top_counts(pages, 3 * budget)
        assert [len(kept) for kept in decision.keep] == expected.tolist()
        assert not decision.demote


def test_permuting_heads_permutes_the_result():
    cache, turned = Cache(1, n_head=4), Cache(1, n_head=4)
    turn = np.array([2, 0, 3, 1])
    turned.scores = [scores[turn] for scores in cache.scores]
    for a, b in zip(decide(cache, 100), decide(turned, 100), strict=True):
        assert [kept.tolist() for kept in b.keep] == [a.keep[h].tolist() for h in turn]
        for name in RUNGS[1:]:
            assert [s.tolist() for s in b.demote[name]] == [a.demote[name][h].tolist() for h in turn]


def test_rungs_that_the_cache_cannot_store_are_left_out():
    cache = Cache(0, slot_bytes={"f16": 256.0, "q8": 136.0})
    for decision in decide(cache, 128):
        assert list(decision.demote) == ["q8"]


def test_a_head_holds_no_more_slots_than_it_has_room_for():
    cache = Cache(0, n=2000)
    view = cache.view(200)
    for layer in view.layers:
        layer.n_room = 320
    for decision in make_policy("ladder").decide(view):
        assert max(len(kept) for kept in decision.keep) <= 320 + 32


def test_the_rungs_are_in_the_order_of_their_bytes_and_errors():
    assert list(ERRORS) == RUNGS and list(ERRORS.values()) == sorted(ERRORS.values())


@pytest.mark.parametrize("budget", [1, 31])
def test_a_budget_below_the_pages_of_sinks_and_window_is_refused(budget):
    with pytest.raises(UsageError, match="at least 32 tokens per head .* was given"):
        decide(Cache(0), budget)


def test_an_unknown_rung_is_refused():
    with pytest.raises(UsageError, match="rungs=f16,q5 is not possible .* some of f16, q8, q4, kv3, kv2"):
        make_policy("ladder", {"rungs": "f16,q5"})


def test_it_asks_for_squares_unless_told_otherwise() -> None:
    assert make_policy("ladder").rms
    assert not make_policy("ladder", {"mean": "plain"}).rms
    assert not make_policy("ada-snapkv").rms
