"""The measurement behind `kvlocal bench`, with contexts that compute nothing and a clock that they advance."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fake_bench import EVICT_S, TOKEN_BYTES, FakeModel, World, install, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.errors import UsageError
from kvlocal.measure import bench
from kvlocal.measure.bench import random_tokens
from kvlocal.measure.bench_config import BenchConfig, Result, Step
from kvlocal.measure.variants import PAGED, Prefill, expand


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    install(monkeypatch, world)
    return world


def config(
    names: str = "streaming", budget: str = "10", prefills: tuple[Prefill, ...] = ("exact",), **fields: Any
) -> BenchConfig:
    """A small measurement of these policies."""
    small = {"depths": (100,), "n_prompt": 8, "n_gen": 4, "repetitions": 1, "chunk": 16, "n_batch": 64, "n_ubatch": 32}
    return BenchConfig(expand(names.split(","), {}, budget.split(","), prefills=prefills), **(small | fields))


def measure(world: World, what: BenchConfig) -> list[Result]:
    return list(run(world, what))


# --- turns ------------------------------------------------------------------------------------------------------


def test_variants_of_one_step_size_take_turns_step_by_step(world: World) -> None:
    measure(world, config("full,paged,streaming", n_gen=0, n_prompt=0))
    steps = [(event.lane, event.begin, event.n) for event in world.of("decode")]
    assert steps == [(lane, begin, min(32, 100 - begin)) for begin in (0, 32, 64, 96) for lane in (0, 1, 2)]


@settings(max_examples=40, deadline=None)
@given(
    depths=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    chunk=st.integers(1, 90),
    n_ubatch=st.integers(1, 90),
)
def test_whoever_is_furthest_behind_goes_next(depths: list[int], chunk: int, n_ubatch: int) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        install(patch, world)
        steps = {"depths": tuple(depths), "chunk": chunk, "n_ubatch": n_ubatch}
        nothing = {"n_gen": 0, "n_prompt": 0}
        results = measure(world, config("full,streaming", prefills=("exact", "chunked"), **steps, **nothing))
    at = [0, 0, 0]
    for event in world.of("decode"):
        assert at[event.lane] == min(at) == event.begin
        at[event.lane] += event.n
        assert event.n <= (chunk if event.lane == 2 else n_ubatch)
    assert at == [max(depths)] * 3
    assert [r.depth for r in results] == [d for d in sorted(set(depths)) for _ in range(3)]


def test_rounds_take_turns_and_each_decodes_then_reads(world: World) -> None:
    measure(world, config("full,streaming", depths=(0,), repetitions=2))
    rounds = [(event.lane, event.begin, event.n) for event in world.of("decode")]
    decode = [(0, pos, 1) for pos in range(4)]
    one = [*decode, (0, 0, 8)]
    warm_up = [(0, 0, 1), (0, 0, 8)]

    def lane(i: int, steps: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        return [(i, begin, n) for _, begin, n in steps]

    assert rounds == [*lane(0, warm_up), *lane(1, warm_up), *lane(0, one), *lane(1, one), *lane(0, one), *lane(1, one)]


def test_logits_are_read_after_every_decoded_token_and_the_device_is_waited_for(world: World) -> None:
    measure(world, config("full", depths=(0,), n_prompt=0))
    what = [event.what for event in world.events]
    assert what == ["decode", "logits", "truncate"] + ["decode", "logits"] * 4 + ["truncate"]
    assert world.waited == len(world.of("decode"))


def test_only_the_last_token_of_a_batch_has_logits(world: World) -> None:
    measure(world, config("full", n_prompt=70, n_gen=0, n_batch=64, n_ubatch=50, depths=(100,)))
    outputs = [(event.begin, event.n, event.outputs) for event in world.of("decode")]
    prefill, warm_up = [(0, 50, "none"), (50, 50, "none")], [(100, 50, "last")]
    assert outputs == [*prefill, *warm_up, (100, 64, "none"), (164, 6, "last")]


# --- what is measured -------------------------------------------------------------------------------------------


def test_medians_and_extremes_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    install(monkeypatch, world)
    # seconds per token: of the warm-up, then of decode and batch in three rounds
    pace = [9.0, 9.0, 1.0, 0.25, 4.0, 2.0, 2.0, 0.5]
    world.unit = lambda _lane: pace[min(len(world.of("truncate")), len(pace) - 1)]
    (result,) = measure(world, config("full", depths=(0,), repetitions=3))
    assert (result.decode_tps, result.decode_tps_min, result.decode_tps_max) == (0.5, 0.25, 1.0)
    assert (result.prefill_tps, result.prefill_tps_min, result.prefill_tps_max) == (2.0, 0.5, 4.0)


def test_every_depth_has_its_own_rounds(world: World) -> None:
    world.unit = lambda _lane: 4.0 if len(world.contexts[0].slots[0]) > 50 else 1.0
    first, second = measure(world, config("full", depths=(0, 50), n_gen=0))
    assert (first.prefill_tps, second.prefill_tps, second.prefill_tps_max) == (1.0, 0.25, 0.25)


def test_exact_eviction_happens_in_a_branch_and_the_text_stays_whole(world: World) -> None:
    results = measure(world, config("streaming", depths=(50, 100)))
    assert [(e.seq, e.held, e.n) for e in world.of("evict")] == [(1, 50, 10), (1, 100, 10)]
    decoded = [e for e in world.of("decode") if e.n == 1]
    assert {e.seq for e in decoded} == {1} and [e.held for e in decoded if e.begin == 100] == [10, 10]
    batches = [e for e in world.of("decode") if e.n == 8]
    assert [(e.seq, e.held) for e in batches] == [(0, 50)] * 2 + [(0, 100)] * 2
    assert world.contexts[0].slots == [list(range(100)), []]
    assert [r.evict_s for r in results] == [EVICT_S, EVICT_S]


def test_chunked_eviction_happens_after_every_chunk_in_the_text(world: World) -> None:
    first, second = measure(world, config("streaming", prefills=("chunked",), depths=(40, 64)))
    assert [(e.seq, e.held) for e in world.of("evict")] == [(0, 16), (0, 26), (0, 18), (0, 26), (0, 18)]
    assert (first.evict_s, second.evict_s) == (3 * EVICT_S, 5 * EVICT_S)
    assert {e.seq for e in world.of("decode")} == {0} and not world.of("branch")
    assert second.held_mean == 10 and second.prompt_s == 64


def test_a_percentage_is_one_of_the_depth(world: World) -> None:
    measure(world, config("streaming", "20%", depths=(50, 100)))
    assert [e.n for e in world.of("evict")] == [10, 20]


def test_seconds_and_speeds_of_the_whole_prompt(world: World) -> None:
    world.unit = lambda lane: (0.5, 0.25)[lane]
    full, streaming = measure(world, config("full,streaming"))
    assert (full.prompt_s, full.prompt_tps, full.evict_s, full.ttft_s) == (50, 2.0, None, 50.5)
    assert (streaming.prompt_s, streaming.prompt_tps) == (25, 100 / 35)
    assert (streaming.evict_s, streaming.ttft_s) == (10, 35.25)


def test_bytes_come_from_the_slots_that_are_decoded_from(world: World) -> None:
    full, paged, exact, chunked = measure(world, config("full,paged,streaming", prefills=("exact", "chunked")))
    for result in (full, paged):
        assert (result.held_mean, result.used_bytes, result.peak_bytes) == (100, 100 * TOKEN_BYTES, 100 * TOKEN_BYTES)
    for result in (exact, chunked):
        assert (result.held_mean, result.used_bytes) == (10, 10 * TOKEN_BYTES)
    assert exact.peak_bytes == 100 * TOKEN_BYTES
    assert chunked.peak_bytes == (10 + 16) * TOKEN_BYTES
    assert {r.full_bytes for r in (full, paged, exact, chunked)} == {100 * TOKEN_BYTES}
    # the four decoded tokens read 11, 12, 13 and 14 slots
    assert exact.attention_bytes_per_token == 12.5 * TOKEN_BYTES
    assert full.attention_bytes_per_token == 102.5 * TOKEN_BYTES


def test_the_peak_counts_the_way_to_a_depth_and_not_what_is_measured_there(world: World) -> None:
    results = measure(world, config("streaming", prefills=("chunked",), depths=(16, 32), n_prompt=200, n_batch=256))
    assert [r.peak_bytes for r in results] == [16 * TOKEN_BYTES, 26 * TOKEN_BYTES]


def test_what_is_skipped_or_does_not_apply_is_none(world: World) -> None:
    full, evicted = measure(world, config("full,streaming", n_prompt=0))
    assert (evicted.prefill_tps, evicted.prefill_tps_min, evicted.prefill_tps_max) == (None, None, None)
    assert evicted.decode_tps == 1 and full.evict_s is None
    (result,) = measure(World(), config("full", n_gen=0))
    assert (result.decode_tps, result.ttft_s, result.attention_bytes_per_token) == (None, None, None)
    assert result.prefill_tps == 1
    (result,) = measure(World(), config("full", depths=(0,)))
    assert (result.prompt_s, result.prompt_tps, result.ttft_s, result.used_bytes) == (0, None, None, 0)


def test_contexts_have_room_and_are_made_as_asked(world: World) -> None:
    measure(world, config("full,paged,snapkv", budget="64", depths=(100, 30), n_prompt=500, n_threads=3))
    made = [context.config for context in world.contexts]
    assert [(c.paged, c.n_seq_max, c.n_window) for c in made] == [(False, 1, 0), (True, 2, 0), (True, 2, 32)]
    assert all(c.n_ctx >= 600 and c.n_threads == 3 and c.n_ubatch == 32 and c.n_batch == 64 for c in made)
    assert all(context.closed for context in world.contexts)


def test_steps_say_what_comes_next(world: World) -> None:
    steps: list[Step] = []
    list(run(world, config("full,streaming", "25%", depths=(40,), repetitions=2), steps.append))
    full, other = "full", "streaming 25%"
    assert [(s.label, s.action, s.done, s.total) for s in steps] == [
        (full, "prefill", 0, 40),
        (other, "prefill", 0, 40),
        (full, "prefill", 32, 40),
        (other, "prefill", 32, 40),
        *((label, "measure", done, 2) for done in (0, 0, 1) for label in (full, other)),
    ]


def test_stopping_closes_everything_and_keeps_the_depths_before(world: World) -> None:
    def stop(step: Step) -> None:
        if step.depth == 100 and step.done == 74:
            raise KeyboardInterrupt

    results = []
    with pytest.raises(KeyboardInterrupt):
        for result in run(world, config("full,streaming", depths=(10, 100)), stop):
            results.append(result)
    assert [(r.policy, r.depth) for r in results] == [("full", 10), ("streaming", 10)]
    assert all(context.closed for context in world.contexts)


def test_only_a_paged_variant_needs_a_model_it_can_serve(world: World) -> None:
    for names, checked in (("full", 0), ("full,paged", 1)):
        model: Any = FakeModel(world)
        list(bench.bench(model, config(names), clock=world.clock, open_context=world.open_context))
        assert model.checked == checked


def test_a_budget_in_bytes_that_the_policy_cannot_work_with_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="A budget of 64B is too small: the policy needs at least 5 tokens per head"):
        measure(world, config("streaming", "64B"))
    assert [context.closed for context in world.contexts] == [True]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": ()}, "nothing to measure"),
        ({"depths": (5, -1)}, "depths has -1; it must be 0 or more"),
        ({"n_prompt": -1}, "n_prompt has -1"),
        ({"n_gen": -1}, "n_gen has -1"),
        ({"repetitions": 0}, "repetitions has 0; it must be 1 or more"),
        ({"evict_every": 0}, "evict_every has 0; it must be 1 or more"),
        ({"depths": (2**31,)}, "is too large"),
    ],
)
def test_impossible_measurements_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        config(**fields)


def test_kernels_reach_the_contexts_of_our_own_cache_alone(world: World) -> None:
    measure(world, config("full,paged,streaming", kernels="portable"))
    assert [context.config.portable for context in world.contexts] == [False, True, True]
    with pytest.raises(UsageError, match="Policy ladder stores tokens in formats other than f16"):
        config("full,ladder", "25%", kernels="portable")


# --- the text ---------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 200), n_vocab=st.integers(8, 50), n_special=st.integers(0, 5))
def test_the_text_is_deterministic_and_without_special_tokens(n: int, n_vocab: int, n_special: int) -> None:
    model: Any = FakeModel(n_vocab=n_vocab, n_special=n_special)
    tokens = random_tokens(model, n)
    assert tokens.dtype == np.int32 and tokens.shape == (n,)
    assert ((tokens >= n_special) & (tokens < n_vocab - 1)).all()
    assert np.array_equal(tokens, random_tokens(model, n))


# --- the sweep --------------------------------------------------------------------------------------------------


def test_the_sweep_goes_by_policy_then_budget_then_prefill() -> None:
    variants = expand(["full", PAGED, "snapkv"], {}, ["25%", "1024"], prefills=["exact", "chunked"])
    assert [v.label for v in variants] == [
        "full",
        "paged",
        "snapkv 25%",
        "snapkv 25% chunked",
        "snapkv 1024",
        "snapkv 1024 chunked",
    ]
    assert [(v.paged, v.policy.evicts, v.chunked) for v in variants[:4]] == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


@given(
    names=st.lists(st.sampled_from(["full", PAGED, "streaming", "snapkv"]), max_size=6),
    budgets=st.lists(st.sampled_from(["25%", "25.0%", "1024", "1GiB"]), min_size=1, max_size=5),
    prefills=st.lists(st.sampled_from(["exact", "chunked"]), min_size=1, max_size=3),
)
def test_every_combination_appears_exactly_once(names: list[str], budgets: list[str], prefills: list[Any]) -> None:
    variants = expand(names, {}, budgets, prefills=prefills)
    n_budgets = len({"25%" if b == "25.0%" else b for b in budgets})
    per_policy = Counter(v.name for v in variants)
    assert list(per_policy) == list(dict.fromkeys(names))
    for name, n in per_policy.items():
        assert n == (1 if name in ("full", PAGED) else n_budgets * len(set(prefills)))
    assert all(a != b for a, b in itertools.combinations(variants, 2))
    idle = [v for v in variants if not v.policy.evicts]
    assert all((str(v.budget), v.prefill) == ("100%", "exact") for v in idle)


def test_arguments_go_to_the_policies_that_have_them() -> None:
    variants = expand(["full", "streaming", "snapkv"], {"window": "16", "sink": "2"}, ["25%"])
    streaming, snapkv = (v.policy for v in variants[1:])
    assert streaming.sink == 2 and (snapkv.sink, snapkv.window) == (2, 16)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "args", "budget", "storage", "sentence"),
    [
        ("full,streaming", {"window": "16"}, "25%", "f16", "None of the policies full, streaming has a parameter 'win"),
        ("snapkv", {"window": "x"}, "25%", "f16", "window=x is not possible for policy snapkv"),
        ("snapky", {}, "25%", "f16", "There is no policy 'snapky' .did you mean 'snapkv'"),
        ("snapkv", {}, "2x", "f16", "'x' in '2x' is not a unit"),
        ("snapkv", {}, "8", "f16", "A budget of 8 tokens per head is too small: the policy needs at least 33"),
        ("full", {}, "25%", "q5", "There is no storage 'q5' for the KV cache; give f16, q8, q4"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(names: str, args: Any, budget: str, storage: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        expand(names.split(","), args, [budget], [storage])
