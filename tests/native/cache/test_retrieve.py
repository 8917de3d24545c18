"""What tokens read of a sequence: kvl_retrieve against numpy, over any changes of the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import retrieval_reference as reference
from contexts import OpenContext, OpenModel, random_tokens
from devices import within
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.retrieval import Retrieval

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
GROUP = 3
MEAN = Retrieval(96, sink=8, recent=16, hysteresis=0)
BOUNDS = replace(MEAN, summary="bounds", n_queries=1, per_head=True, min_unit=1)


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def unit_ends(n: int, seed: int = 0, least: int = 4, most: int = 40) -> list[int]:
    """Ends of units before token ``n``."""
    sizes = np.random.default_rng(seed).integers(least, most, n)
    return [int(end) for end in np.cumsum(sizes) if end < n]


def expected(cache: PagedCache, seq: int, layer: int, asked: Retrieval, ends: list[int]) -> list[np.ndarray]:
    """Positions that every KV head reads, of a cache that holds all positions."""
    keys = [cache.keys_values(seq, layer, h)[0].astype(np.float64) for h in range(2)]
    n = len(keys[0])
    open_begin = ends[-1] if ends else 0
    count = asked.n_queries or (n - open_begin if n - open_begin >= 2 else 32)
    queries = cache.queries(seq, layer, count).astype(np.float64).mean(0)
    units = [np.arange(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    scores = []
    for h in range(2):
        group = queries[h * GROUP : (h + 1) * GROUP]
        if asked.summary == "mean":
            # what stands for a unit is stored in f16
            means = np.array([reference.mean_key(keys[h][unit]) for unit in units]).astype(np.float16)
            scores.append(means.astype(np.float64) @ group.sum(0))
        elif asked.summary == "bounds":
            limits = [reference.bounds(keys[h][unit]).astype(np.float16).astype(np.float64) for unit in units]
            scores.append(np.array([sum(reference.bound(q, of) for q in group) for of in limits]))
        else:
            scores.append(np.arange(len(units), dtype=np.float64))
    parts = reference.eligible(ends, n, asked.sink, asked.recent)
    room = asked.budget - asked.sink - asked.recent
    always = {*range(min(asked.sink, n)), *range(max(n + 1 - asked.recent, 0), n), *range(open_begin, n)}
    out = []
    for h in range(2):
        mine = np.array(scores)[[h] if asked.per_head else [0, 1]]
        total = sum(map(len, parts))
        chosen, part = (
            (list(range(len(units))), None)
            if total <= room
            else reference.choose(
                list(reference.one_scale(mine)), [len(p) for p in parts], room, asked.min_unit, partial=asked.partial
            )
        )
        seen = always.union(*(units[u].tolist() for u in chosen))
        if part is not None:
            seen.update(parts[part[0]][: part[1]].tolist())
        out.append(np.array(sorted(seen)))
    return out


@pytest.mark.parametrize(
    "asked",
    [
        MEAN,
        BOUNDS,
        replace(MEAN, per_head=True),
        replace(MEAN, partial=True, min_unit=1),
        replace(MEAN, n_queries=5),
        replace(BOUNDS, per_head=False),
        replace(MEAN, summary="none"),
        replace(MEAN, budget=1000),
    ],
    ids=["mean", "bounds", "per head", "partial", "queries", "shared bounds", "none", "all"],
)
def test_it_reads_what_the_reference_reads(asked: Retrieval, open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, n_seq_max=2)
    cache, tokens = paged(context), random_tokens(model, 330)
    context.decode(tokens[:300], 0, 0)
    ends = unit_ends(280)
    cache.branch(0, 1)
    step = cache.retrieve(0, asked, ends)
    want = [expected(cache, 1, layer, asked, ends) for layer in range(2)]
    assert step.n_units == len(ends) and not step.full
    assert step.n_read == pytest.approx(np.mean([len(head) for heads in want for head in heads]))
    for layer, heads in enumerate(want):
        cache.select(1, layer, heads)
    for pos in range(300, 304):
        context.decode([tokens[pos], tokens[pos]], np.array([pos, pos]), np.array([0, 1]), outputs="all")
        one, other = context.logits(2)
        np.testing.assert_array_equal(one, other)


def attended(
    cache: PagedCache, layer: int, asked: Retrieval, ends: list[int], held: list[np.ndarray]
) -> list[set[int]]:
    """Positions that every KV head reads by attention; ``held``: those that it has."""
    n = int(max(positions[-1] for positions in held)) + 1
    scores = cache.window_scores(0, layer, asked.n_queries).astype(np.float64)
    out = []
    for h, positions in enumerate(held):
        mass = dict(zip(positions.tolist(), scores[h * GROUP : (h + 1) * GROUP].sum(0), strict=False))
        first, last = min(asked.sink, n), max(asked.sink, n + 1 - asked.recent)
        seen = {p for p in mass if p < first or p >= last or p >= ends[-1]}
        units = [range(max(b, first), min(e, last)) for b, e in zip([0, *ends[:-1]], ends, strict=True)]
        parts = [[p for p in unit if p in mass] for unit in units]
        worth = [sum(mass[p] for p in part) / max(len(part), 1) for part in parts]
        free = asked.budget - asked.sink - asked.recent
        if sum(map(len, parts)) <= free:
            worth, free = [1.0] * len(parts), n
        for u in sorted(range(len(parts)), key=lambda u: (-worth[u], u)):
            if 0 < len(parts[u]) <= free:
                free -= len(parts[u])
                seen.update(p for p in mass if ([0, *ends])[u] <= p < ends[u])
        out.append(seen)
    return out


@pytest.mark.parametrize("evicted", [False, True], ids=["all", "some"])
def test_by_attention_it_holds_on(evicted: bool, open_model: OpenModel, open_context: OpenContext) -> None:
    """The choice is that of the attention itself; single tokens change nothing, ``every`` of them or a text do."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, n_seq_max=2)
    cache, tokens = paged(context), random_tokens(model, 330)
    asked = Retrieval(96, "attention", 8, 16, n_queries=8, min_unit=1, per_head=True, every=5)
    context.decode(tokens[:300], 0, 0)
    ends = unit_ends(280)
    if evicted:
        for layer in range(2):
            cache.keep(0, layer, [np.arange(0, 300, 2), np.sort(np.r_[0:100:3, 100:300])])
    held = [cache.positions(0, layer) for layer in range(2)]
    step = cache.retrieve(0, asked, ends)
    want = [attended(cache, layer, asked, ends, held[layer]) for layer in range(2)]
    assert step.n_read == pytest.approx(np.mean([len(head) for heads in want for head in heads]))
    cache.branch(0, 1)
    for layer, heads in enumerate(want):
        slots = [np.flatnonzero([p in seen for p in at]) for at, seen in zip(held[layer], heads, strict=True)]
        cache.select(1, layer, slots)
    for pos in range(300, 305):
        context.decode([tokens[pos], tokens[pos]], np.array([pos, pos]), np.array([0, 1]), outputs="all")
        np.testing.assert_array_equal(*context.logits(2))
        again = cache.retrieve(0, asked)
        held_on = pos < 304
        assert (again.n_read == pytest.approx(step.n_read + pos - 299)) == held_on, pos
    context.decode(tokens[305:325], 305, 0)
    want = [attended(cache, layer, asked, ends, cache.positions(0, layer)) for layer in range(2)]
    assert cache.retrieve(0, asked).n_read == pytest.approx(np.mean([len(head) for heads in want for head in heads]))
    with pytest.raises(KVError, match="one by attention also n_queries"):
        cache.retrieve(0, replace(asked, n_queries=0))


def test_enough_room_is_reading_everything(open_model: OpenModel, open_context: OpenContext) -> None:
    """A1: the same logits to the bit; and what was narrowed is whole again."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 120)
    logits = []
    for asked in (None, replace(MEAN, budget=200), MEAN):
        context = open_context(model, n_window=64)
        context.decode(tokens[:119], 0, 0)
        if asked is not None:
            paged(context).retrieve(0, asked, unit_ends(119))
        if asked is MEAN:
            assert paged(context).retrieve(0, asked).n_read < 119
            paged(context).read_all(0)
        context.decode(tokens[119:], 119, 0)
        logits.append(context.logits()[0])
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_a_sequence_that_was_cut_is_as_if_it_had_been_read_so(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    tokens, ends = random_tokens(model, 260), unit_ends(250)
    fresh, cut = open_context(model, n_window=64), open_context(model, n_window=64)
    kept = [end for end in ends if end < 170]
    cut.decode(tokens[:250], 0, 0)
    paged(cut).retrieve(0, MEAN, ends)
    paged(cut).truncate(0, 170)
    paged(cut).read_all(0)
    for context in (fresh, cut):
        if context is fresh:
            context.decode(tokens[:170], 0, 0)
        context.decode(tokens[170:220], 170, 0)
    ends_then = [end for end in ends if 170 <= end < 200]
    one = paged(fresh).retrieve(0, MEAN, kept + ends_then)
    other = paged(cut).retrieve(0, MEAN, ends_then)
    assert (one.n_units, one.n_read, one.n_wanted) == (other.n_units, other.n_read, other.n_wanted)
    for context in (fresh, cut):
        context.decode(tokens[220:221], 220, 0)
    np.testing.assert_allclose(fresh.logits()[0], cut.logits()[0], rtol=0, atol=within(1e-4))


def test_a_branch_goes_its_own_way(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, n_seq_max=2)
    cache, tokens, ends = paged(context), random_tokens(model, 300), unit_ends(190)
    context.decode(tokens[:200], 0, 0)
    first = cache.retrieve(0, MEAN, ends)
    cache.branch(0, 1)
    cache.truncate(0, 0)
    context.decode(tokens[200:260], 200, 1)
    second = cache.retrieve(1, MEAN, [200, 240])
    assert second.n_units == first.n_units + 2
    assert cache.retrieve(0, MEAN).n_units == 0


def test_the_beginning_of_a_unit_may_read_everything(open_model: OpenModel, open_context: OpenContext) -> None:
    """U14 as it is here: of twelve steps with a delimiter at the fifth, the two behind the one that shows it."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64)
    cache, asked = paged(context), replace(MEAN, full_below=3)
    tokens = random_tokens(model, 220)
    context.decode(tokens[:200], 0, 0)
    kinds = "F" if cache.retrieve(0, asked, unit_ends(190)).full else "S"
    for step in range(12):
        context.decode(tokens[200 + step : 201 + step], 200 + step, 0)
        kinds += "F" if cache.retrieve(0, asked, [206] if step == 6 else []).full else "S"
    assert kinds == "SSSSSSSFFSSSS"


def test_what_is_evicted_takes_no_room(open_model: OpenModel, open_context: OpenContext) -> None:
    """Units of which a head holds nothing are not chosen, and tokens that are gone do not count."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64)
    cache, ends = paged(context), list(range(10, 200, 10))
    context.decode(random_tokens(model, 200), 0, 0)
    cache.index(0, MEAN, ends)
    keep = np.r_[0:8, 50:60, 100:200]
    for layer in range(2):
        cache.keep(0, layer, [keep, keep])
    held = len(keep)
    assert cache.retrieve(0, replace(MEAN, budget=held + 1)).n_read == held
    step = cache.retrieve(0, replace(MEAN, budget=60))
    assert step.n_wanted <= 60 - 8 - 16 < step.n_wanted + 10


CHANGES = st.lists(st.tuples(st.sampled_from(["add", "cut", "keep", "branch"]), st.integers(1, 90)), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, asked=st.sampled_from([MEAN, BOUNDS]))
def test_no_slot_is_ever_out_of_reach(
    open_model: OpenModel, open_context: OpenContext, changes: list[tuple[str, int]], asked: Retrieval
) -> None:
    """A2: whatever is done to a sequence, room for everything reads everything, and no budget is exceeded."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, n_seq_max=2, n_ctx=1200)
    cache, random = paged(context), np.random.default_rng(len(changes))
    seq, n, ends = 0, 0, list[int]()
    for what, size in [("add", 70), *changes]:
        if what == "add":
            context.decode(random_tokens(model, size, size), n, seq)
            n += size
        elif what == "cut" and n > 1:
            n = max(1, n - size)
            cache.truncate(seq, n)
            ends = [end for end in ends if end < n]
        elif what == "keep":
            for layer, held in enumerate(cache.held(seq)):
                some = [np.sort(random.permutation(int(of))[: max(1, int(of) - size)]) for of in held]
                cache.keep(seq, layer, some)
        elif what == "branch":
            cache.branch(seq, 1 - seq)
            seq = 1 - seq
        more = list(range((ends[-1] if ends else 0) + 7, n, 7))
        ends += more
        everything = cache.retrieve(seq, replace(asked, budget=10_000), more)
        assert everything.n_read == pytest.approx(np.mean([np.mean(of) for of in cache.held(seq)]))
        part = cache.retrieve(seq, asked)
        assert part.n_read <= asked.budget + 7 + 1e-3
        assert part.n_kept <= part.n_wanted + 1e-3
        assert part.n_wanted <= asked.budget - asked.sink - asked.recent + 1e-3


@pytest.mark.parametrize(
    ("change", "ends", "error"),
    [
        ({}, [10, 10], "a unit that ends at token 10"),
        ({}, [100], "a unit that ends at token 100"),
        ({"budget": 3}, [10], "a budget of at least sink"),
        ({"recent": 0}, [10], "a budget of at least sink"),
    ],
)
def test_what_cannot_be_is_refused(
    change: dict[str, Any], ends: list[int], error: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=8)
    context.decode(random_tokens(model, 100), 0, 0)
    with pytest.raises(KVError, match=f"(?i){error}"):
        paged(context).retrieve(0, replace(MEAN, **change), ends)
    assert paged(context).retrieve(0, MEAN, [50]).n_units == 1


def test_without_remembered_queries_it_is_refused(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama", **SHAPE), n_window=0)
    context.decode([5, 6, 7], 0, 0)
    with pytest.raises(KVError, match="n_window is 0"):
        paged(context).retrieve(0, MEAN)
    assert paged(context).retrieve(0, replace(MEAN, summary="none")).n_units == 0


@pytest.mark.needs_kernels
def test_tokens_that_are_demoted_stay_what_they_were(open_model: OpenModel, open_context: OpenContext) -> None:
    """What stands for them is that of the exact keys, and they are found where they lie now."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, formats=("kv2",), rotate=True)
    cache, ends = paged(context), unit_ends(190)
    context.decode(random_tokens(model, 200), 0, 0)
    before = cache.retrieve(0, MEAN, ends)
    for layer in range(2):
        cache.centre(0, layer, 0, 64)
        cache.demote(0, layer, [np.arange(0, 128), np.arange(20, 150)], "kv2")
    after = cache.retrieve(0, MEAN)
    assert (after.n_read, after.n_kept) == (before.n_read, before.n_wanted)
