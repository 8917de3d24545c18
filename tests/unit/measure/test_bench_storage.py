"""`kvlocal bench` over storages: what is demoted when, and what the rows say; with contexts that compute nothing."""

from __future__ import annotations

from typing import Any

import pytest
from fake_bench import DEMOTE_S, EVICT_S, TOKEN_BYTES, Event, World, install, run

from kvlocal.errors import UsageError
from kvlocal.measure.bench_config import BenchConfig, Result
from kvlocal.measure.variants import PAGED, Prefill, expand
from kvlocal.storage.storage import STORAGES, Storage

SINK, TAIL = Storage().sink, Storage().tail


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    install(monkeypatch, world)
    return world


def measure(
    world: World, names: str, storages: str = "q8", budget: str = "250", prefill: Prefill = "exact", **fields: Any
) -> list[Result]:
    small: dict[str, Any] = {"depths": (300,), "n_prompt": 0, "n_gen": 8, "repetitions": 2, "chunk": 200}
    variants = expand(names.split(","), {}, [budget], storages.split(","), [prefill])
    return list(run(world, BenchConfig(variants, **(small | {"evict_every": 4} | fields))))


def demoted(world: World) -> list[tuple[int, int, int]]:
    """Sequence, first position and number of tokens of every demotion."""
    return [(event.seq, event.begin, event.n) for event in world.of("demote")]


def stored(n: int, n_demoted: int) -> float:
    """Bytes of ``n`` tokens, some of them demoted."""
    return (n - n_demoted) * TOKEN_BYTES + n_demoted * TOKEN_BYTES / 4


# --- what is demoted when ---------------------------------------------------------------------------------------


def test_the_text_is_demoted_in_a_branch_and_stays_whole(world: World) -> None:
    first, second = measure(world, "paged", depths=(200, 300), n_gen=0)
    assert demoted(world) == [(1, SINK, 200 - TAIL - SINK), (1, SINK, 300 - TAIL - SINK)]
    context = world.contexts[0]
    assert context.slots == [list(range(300)), [], []] and context.demoted == [set(), set(), set()]
    assert (first.evict_s, second.evict_s) == (DEMOTE_S, DEMOTE_S)
    assert second.used_bytes == stored(300, 140) and second.held_mean == 300
    assert second.peak_bytes == second.full_bytes == 300 * TOKEN_BYTES


def test_what_the_policy_leaves_is_demoted_after_its_eviction(world: World) -> None:
    (result,) = measure(world, "streaming", n_gen=0)
    assert [e.what for e in world.events if e.seq == 1][:3] == ["branch", "evict", "demote"]
    # the fake keeps the latest 250 of 300 tokens, so it has no sinks left
    assert demoted(world) == [(1, 50, 250 - TAIL)]
    assert result.evict_s == EVICT_S + DEMOTE_S
    assert result.prompt_tps == 300 / (300 + EVICT_S + DEMOTE_S)
    assert result.used_bytes == stored(250, 250 - TAIL)


def test_chunks_are_demoted_in_the_text_on_the_way(world: World) -> None:
    (result,) = measure(world, "streaming", prefill="chunked", repetitions=1, n_gen=4)
    chunks = [event for event in world.of("demote") if event.seq == 0]
    assert [(e.begin, e.n) for e in chunks] == [(SINK, 200 - TAIL - SINK), (200 - TAIL, 100)]
    assert result.evict_s == 2 * (EVICT_S + DEMOTE_S)
    # those of the first chunk that are still there, and those of the second
    assert result.used_bytes == stored(250, 22 + 100)
    assert result.peak_bytes == 300 * TOKEN_BYTES


def test_what_leaves_the_tail_is_demoted_while_decoding_and_every_round_begins_alike(world: World) -> None:
    (result,) = measure(world, "paged")
    begin = 300 - TAIL
    one = [(2, begin, 4), (2, begin + 4, 4)]
    assert demoted(world) == [(1, SINK, begin - SINK), *one, *one]
    what = [event.what for event in world.events if event.seq == 2]
    step = ["decode"] * 4 + ["demote"]
    assert what == ["branch", "decode", "truncate", *(["branch", *step, *step, "truncate"] * 2)]
    assert result.decode_tps == 8 / (8 + 2 * DEMOTE_S)
    assert result.evict_s == DEMOTE_S


def test_a_round_that_ends_before_a_demotion_is_due_has_none(world: World) -> None:
    measure(world, "paged", n_gen=7, repetitions=1)
    assert len([event for event in world.of("demote") if event.seq == 2]) == 1


def test_attention_reads_the_bytes_that_are_stored_at_every_token(world: World) -> None:
    (result,) = measure(world, "paged")
    n, own = 300 - SINK - TAIL, []
    for i in range(1, 9):
        n_demoted = n + (4 if i > 4 else 0)
        own.append(stored(300 + i, n_demoted))
    assert result.attention_bytes_per_token == pytest.approx(sum(own) / 8)
    (plain,) = measure(World(), "paged", "f16")
    assert plain.attention_bytes_per_token == 304.5 * TOKEN_BYTES


def test_a_batch_is_read_after_the_text_as_its_prefill_left_it(world: World) -> None:
    measure(world, "paged", n_prompt=16, n_gen=0)
    batches = [event for event in world.of("decode") if event.n == 16]
    assert {(event.seq, event.held) for event in batches} == {(0, 300)}


def test_a_budget_in_bytes_holds_more_tokens_of_fewer_bits(world: World) -> None:
    measure(world, "streaming", "f16,q8,q4", budget="80KiB", depths=(1000,), n_gen=0)
    budgets = [event.n for event in world.of("evict")]
    assert budgets == sorted(budgets) and len(set(budgets)) == 3 and 0 < budgets[0] <= 80 * 1024 / TOKEN_BYTES


# --- who stores how ---------------------------------------------------------------------------------------------


def test_full_is_made_in_llama_cpps_own_type_and_not_demoted(world: World) -> None:
    results = measure(world, "full", "f16,q8,q4")
    assert [context.config.type_kv for context in world.contexts] == ["f16", "q8", "q4"]
    assert all(context.config.formats == () and not context.config.rotate for context in world.contexts)
    assert not world.of("demote") and [r.evict_s for r in results] == [None] * 3
    assert [r.storage for r in results] == ["f16", "q8", "q4"]


def test_contexts_are_made_with_the_formats_of_their_storage(world: World) -> None:
    measure(world, "paged,streaming", "f16,q8", n_gen=0)
    made = [context.config for context in world.contexts]
    fields = [(c.formats, c.rotate, c.n_seq_max, c.type_kv) for c in made]
    assert fields == [((), False, 2, "f16"), (("q8",), True, 3, "f16")] * 2


def test_every_storage_has_its_rows_and_full_only_those_of_llama_cpp() -> None:
    variants = expand(["full", PAGED, "snapkv"], {}, ["25%"], STORAGES)
    stock = [v.label for v in variants if v.name == "full"]
    assert stock == ["full", "full q8", "full q4"]
    for name in (PAGED, "snapkv"):
        mine = [v for v in variants if v.name == name]
        assert [v.storage for v in mine] == list(STORAGES)
        assert [v.demotes for v in mine] == [storage != "f16" for storage in STORAGES]
        assert all(v.type_kv == "f16" for v in mine)


def test_full_alone_in_a_storage_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="'full' is llama.cpp's own cache, which is never stored in kv3 or kv2; give"):
        expand(["full"], {}, ["25%"], ["kv3", "kv2"])
    assert [v.label for v in expand(["full"], {}, ["25%"], ["kv3", "q8"])] == ["full q8"]


def test_rounds_of_all_storages_take_turns(world: World) -> None:
    measure(world, "full,paged", "q8,q4", n_gen=4, repetitions=2)

    def lanes(events: list[Event]) -> list[int]:
        return [event.lane for event in events if event.n == 1 and event.begin == 303]

    assert lanes(world.of("decode")) == [0, 1, 2, 3] * 2
