"""What memory loses lies on disk, exact, and comes back: kvl_archive_to and kvl_retrieve with a recall."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skips import NO_ARCHIVE

from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import FORMATS
from kvlocal.native.retrieval import Retrieval

pytestmark = pytest.mark.skipif(not devices.chosen.is_cpu, reason=NO_ARCHIVE)

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
GROUP = 3
TURN = Retrieval(10_000, "none", 0, 1, n_queries=8, min_unit=1, per_head=True, recall="turn")
N = 200
ENDS = [17, 30, 65, 80, 111, 150, 171, N]

Archived = Callable[..., tuple[Context, PagedCache, list[int]]]


@pytest.fixture
def archived(open_model: OpenModel, open_context: OpenContext, tmp_path: Path) -> Archived:
    """``archived(storage, **context settings)``: a context whose sequence 0 has N tokens, all of them archived."""

    def get(storage: Any = "f16", **config: Any) -> tuple[Context, PagedCache, list[int]]:
        model = open_model("llama", **SHAPE)
        context = open_context(model, **{"n_window": 32, "n_seq_max": 3, "n_ctx": 512} | config)
        cache, tokens = context.cache, random_tokens(model, N + 60)
        assert cache is not None
        cache.archive_to(0, tmp_path, storage)
        read(context, cache, tokens)
        return context, cache, tokens

    return get


@pytest.fixture
def one(archived: Archived) -> tuple[Context, PagedCache, list[int]]:
    return archived()


def read(context: Context, cache: PagedCache, tokens: list[int]) -> None:
    context.decode(tokens[:N], 0, 0)
    cache.index(0, TURN, ENDS)


def keep_only(cache: PagedCache, seq: int, slots: np.ndarray) -> None:
    for layer in range(2):
        cache.keep(seq, layer, [slots, slots])


def logits_of(context: Context, seq: int, tokens: list[int], pos: int) -> np.ndarray:
    context.decode(tokens, np.arange(pos, pos + len(tokens), dtype=np.int32), np.full(len(tokens), seq, np.int32))
    return context.logits()[0]


def files() -> list[str]:
    """Archives that this process has open."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if "kvlocal-archive-" in target:
            found.append(str(fd))
    return found


@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "portable"])
@pytest.mark.parametrize("n_new", [1, 40], ids=["token", "prompt"])
def test_all_that_comes_back_is_as_if_nothing_had_gone(portable: bool, n_new: int, archived: Archived) -> None:
    context, cache, tokens = archived(portable=portable)
    cache.branch(0, 1)
    whole = logits_of(context, 1, tokens[N : N + n_new], N)
    keep_only(cache, 0, np.arange(3))
    poor = logits_of(context, 0, tokens[N : N + n_new], N)
    assert np.abs(poor - whole).max() > 0.01
    step = cache.retrieve(0, TURN)
    cache.truncate(0, N)
    assert step.n_recalled == N - 3 and step.n_missed == 0
    # all keys are looked at, then all units read
    assert step.read_bytes == N * cache.bytes_per_token * 3 // 2
    assert cache.seq_stats(0).recalled_bytes == (N - 3) * cache.bytes_per_token
    assert cache.seq_stats(0).used_bytes == N * cache.bytes_per_token
    # packed: three tokens in a page, the others in seven, of each of four heads; the branch has all of its own
    page = 32 * cache.bytes_per_token // 4
    assert cache.stats().allocated_bytes == 4 * page * (1 + 7 + -(-(N + n_new) // 32))
    back = logits_of(context, 0, tokens[N : N + n_new], N)
    # in another order, so that sums are rounded otherwise
    np.testing.assert_allclose(back, whole, atol=1e-4 if not portable else 4e-3)


def test_in_q8_it_is_about_that(archived: Archived) -> None:
    context, cache, tokens = archived("q8")
    cache.branch(0, 1)
    whole = logits_of(context, 1, tokens[N : N + 1], N)
    keep_only(cache, 0, np.arange(3))
    poor = logits_of(context, 0, tokens[N : N + 1], N)
    cache.truncate(0, N)
    cache.retrieve(0, TURN)
    back = logits_of(context, 0, tokens[N : N + 1], N)
    assert 0 < np.abs(back - whole).max() < 0.1 * np.abs(poor - whole).max()


def test_what_lies_on_a_lower_rung_is_read_once(archived: Archived) -> None:
    context, cache, tokens = archived(formats=("q4",), rotate=True)
    cache.branch(0, 1)
    whole = logits_of(context, 1, tokens[N : N + 1], N)
    for layer in range(2):
        cache.demote(0, layer, [np.arange(150)] * 2, "q4")
    rough = logits_of(context, 0, tokens[N : N + 1], N)
    cache.truncate(0, N)
    step = cache.retrieve(0, TURN)
    assert step.n_recalled == 150 and step.n_read == N
    back = logits_of(context, 0, tokens[N : N + 1], N)
    assert np.abs(back - whole).max() < 0.05 * np.abs(rough - whole).max()
    # cut back to before some of it: their copies are seen again
    cache.truncate(0, 140)
    assert cache.seq_stats(0).recalled_bytes == 111 * cache.bytes_per_token
    for layer in range(2):
        formats = cache.slot_formats(0, layer)
        assert all((heads == FORMATS.index("q4")).all() for heads in formats)


@pytest.mark.parametrize("config", [{}, {"formats": ("q4",), "rotate": True}], ids=["plain", "rotated"])
def test_the_units_with_most_attention_per_missing_token_come_back(config: Any, archived: Archived) -> None:
    context, cache, tokens = archived(**config)
    cache.branch(0, 1)  # holds all keys
    keep_only(cache, 0, np.array([0, 20, 21, 190]))
    logits_of(context, 0, tokens[N : N + 8], N)
    asked = replace(TURN, budget=60)
    step = cache.retrieve(0, asked)
    assert 0 < step.n_recalled <= 60
    wanted = 0
    for layer in range(2):
        queries = cache.queries(0, layer, 8).astype(np.float64)
        for h in range(2):
            keys = cache.keys_values(1, layer, h)[0].astype(np.float64)
            z = np.concatenate([q[h * GROUP : (h + 1) * GROUP] for q in queries]) @ keys.T
            z *= cache.layers[layer].kq_scale
            p = np.exp(z - z.max(1, keepdims=True))
            mass = (p / p.sum(1, keepdims=True)).sum(0)
            held = {0, 20, 21, 190}
            units = [range(begin, end) for begin, end in zip([0, *ENDS[:-1]], ENDS, strict=True)]
            missing = [[i for i in unit if i not in held] for unit in units]
            scores = [mass[list(unit)].sum() / len(lost) for unit, lost in zip(units, missing, strict=True)]
            free = 60
            for u in np.argsort(scores)[::-1]:
                if len(missing[u]) <= free:
                    free -= len(missing[u])
                    wanted += len(missing[u])
    assert step.n_recalled == wanted / 4


def test_the_sequence_goes_on_and_turns_follow(archived: Archived) -> None:
    context, cache, tokens = archived()
    keep_only(cache, 0, np.arange(10))
    cache.retrieve(0, replace(TURN, budget=40))
    logits_of(context, 0, tokens[N : N + 20], N)
    cache.index(0, TURN, [N + 20])
    keep_only(cache, 0, np.arange(5))
    assert cache.archived(0).n_units == len(ENDS) + 1
    first = cache.seq_stats(0).recalled_bytes
    step = cache.retrieve(0, replace(TURN, budget=100))
    assert cache.seq_stats(0).recalled_bytes > first and step.n_recalled <= 100
    assert cache.retrieve(0, replace(TURN, budget=1)).n_recalled == 0
    assert cache.seq_stats(0).recalled_bytes == 0


def test_what_has_gone_since_comes_with_its_unit(archived: Archived) -> None:
    context, cache, tokens = archived()
    logits_of(context, 0, tokens[N : N + 1], N)
    whole = context.logits()[0]
    cache.truncate(0, N)
    keep_only(cache, 0, np.arange(100))
    assert cache.retrieve(0, TURN).n_recalled == 100
    keep_only(cache, 0, np.arange(50))
    assert cache.retrieve(0, TURN).n_recalled == 150
    np.testing.assert_allclose(logits_of(context, 0, tokens[N : N + 1], N), whole, atol=1e-4)


def test_only_what_is_not_there_is_loaded(archived: Archived) -> None:
    """U13, by the counters: units are chosen for whole layers, of which token 0 alone is held."""
    context, cache, tokens = archived()
    logits_of(context, 0, tokens[N : N + 8], N)
    cache.truncate(0, N + 1)
    keep_only(cache, 0, np.array([0, N]))
    few = replace(TURN, budget=60, per_head=False)
    first = cache.retrieve(0, few)
    assert first.n_loaded in (first.n_recalled, first.n_recalled + 0.5, first.n_recalled + 1)
    again = cache.retrieve(0, few)
    assert (again.n_loaded, again.n_recalled) == (0, first.n_recalled)
    rest = cache.retrieve(0, TURN)
    assert rest.n_recalled == N - 1 and rest.n_loaded == N - first.n_loaded
    given_back = cache.retrieve(0, few)
    assert (given_back.n_loaded, given_back.n_recalled) == (0, first.n_recalled)


def test_a_step_reads_ahead(archived: Archived) -> None:
    """What a step chooses and does not find comes with the next one; a cut forgets what is on its way."""
    context, cache, tokens = archived()
    cache.branch(0, 1)
    keep_only(cache, 0, np.r_[0:4, 190:N])
    step = Retrieval(120, "none", 4, 10, min_unit=1, per_head=True, recall="step")
    first, second = cache.retrieve(0, step), cache.retrieve(0, step)
    assert first.n_recalled == 0 and first.n_loaded > 0 and first.n_missed > 50
    assert second.n_recalled == first.n_missed and second.n_missed == second.n_loaded == 0
    whole = cache.retrieve(1, replace(step, recall="off"))
    assert whole.n_read == second.n_read
    one, other = (logits_of(context, seq, tokens[N : N + 1], N) for seq in (0, 1))
    np.testing.assert_allclose(one, other, atol=1e-4)
    cache.truncate(0, N)
    cache.retrieve(0, replace(step, budget=15))
    assert cache.seq_stats(0).recalled_bytes == 0
    assert cache.retrieve(0, step).n_loaded > 0
    cache.truncate(0, 0)
    read(context, cache, tokens)
    assert cache.retrieve(0, step).n_recalled == 0


def test_mass_and_renumbering_give_back(archived: Archived) -> None:
    context, cache, tokens = archived()
    keep_only(cache, 0, np.arange(64))
    cache.retrieve(0, TURN)
    cache.accumulate_mass("sum")
    assert cache.seq_stats(0).recalled_bytes == 0
    cache.retrieve(0, TURN)
    logits_of(context, 0, tokens[N : N + 1], N)
    for layer in range(2):
        mass = cache.mass(0, layer)
        # the rest of the attention went to what was recalled
        assert mass.shape[1] == 65 and (mass.sum(1) < 0.9).all() and (mass > 0).all()
    cache.truncate(0, N)
    cache.accumulate_mass("none")
    cache.retrieve(0, TURN)
    cache.roll(0)
    assert cache.seq_stats(0).recalled_bytes == 0 and cache.archived(0).n_units == 0


def test_branches_share_an_archive(archived: Archived) -> None:
    context, cache, tokens = archived()
    keep_only(cache, 0, np.arange(3))
    cache.retrieve(0, TURN)
    cache.branch(0, 1)
    assert cache.seq_stats(1).recalled_bytes == 0, "what was recalled belongs to the one that asked"
    assert len(files()) == 1 and cache.stats().archive_bytes == 2 * cache.archived(0).bytes
    one = logits_of(context, 0, tokens[N : N + 1], N)
    cache.truncate(0, 0)
    assert cache.archived(0).n_units == 0 and len(files()) == 1
    cache.retrieve(1, TURN)
    np.testing.assert_array_equal(logits_of(context, 1, tokens[N : N + 1], N), one)
    cache.truncate(1, 0)
    assert len(files()) == 0


def test_a_unit_that_is_archived_stays_closed(archived: Archived) -> None:
    _, cache, _ = archived()
    cache.truncate(0, 171)
    assert cache.archived(0).n_units == 7
    cache.truncate(0, 170)
    assert cache.archived(0).n_units == 6


def test_what_was_gone_before_is_lost(open_model: OpenModel, open_context: OpenContext, tmp_path: Path) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=32, n_ctx=512)
    cache, tokens = context.cache, random_tokens(model, 100)
    assert cache is not None
    context.decode(tokens, 0, 0)
    keep_only(cache, 0, np.arange(40, 100))
    cache.archive_to(0, tmp_path)
    cache.index(0, TURN, [30, 60, 100])
    found = cache.archived(0)
    assert (found.n_units, found.n_lost, found.error) == (3, 2, "")
    keep_only(cache, 0, np.arange(5))
    assert cache.retrieve(0, TURN).n_recalled == 100 - 60


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_costs_the_units_it_hits(data: st.DataObject, one: tuple[Context, PagedCache, list[int]]) -> None:
    context, cache, tokens = one
    cache.truncate(0, 0)
    read(context, cache, tokens)
    keep_only(cache, 0, np.arange(3))
    size = cache.archived(0).bytes
    (path,) = files()
    with open(path, "r+b") as file:
        if data.draw(st.booleans(), label="truncate"):
            file.truncate(data.draw(st.integers(0, size - 1)))
        else:
            for _ in range(data.draw(st.integers(1, 3))):
                file.seek(data.draw(st.integers(0, size - 1)))
                file.write(data.draw(st.binary(min_size=1, max_size=9)))
    step = cache.retrieve(0, TURN)
    found = cache.archived(0)
    lost = N - 3 - step.n_recalled
    assert (found.n_lost > 0) == (lost > 0) == bool(found.error)
    if found.error:
        assert "the archive's record of tokens" in found.error
    assert np.isfinite(logits_of(context, 0, tokens[N : N + 1], N)).all()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_token_can_be_read_always(data: st.DataObject, one: tuple[Context, PagedCache, list[int]]) -> None:
    """Whatever is added, evicted, recalled, cut and branched: a head holds a token, or the archive does."""
    context, cache, tokens = one
    for seq in range(3):
        cache.truncate(seq, 0)
    seq, n, evicted_at, ends = 0, 0, 0, list[int]()
    for _ in range(data.draw(st.integers(2, 12), label="changes")):
        what = data.draw(st.sampled_from(["add", "add", "evict", "evict", "recall", "cut", "branch"]))
        if what == "add" and n < len(tokens):
            more = tokens[n : n + data.draw(st.integers(1, 60))]
            logits_of(context, seq, more, n)
            n += len(more)
        elif what == "evict" and n > 0:
            new = [n] if n > (ends[-1] if ends else 0) else []
            if new and n - (ends[-1] if ends else 0) > 20:
                new = [n - 10, n]
            cache.index(seq, TURN, new)
            ends += new
            for layer in range(2):
                held = cache.lengths(seq, layer)
                share = data.draw(st.integers(1, 8))
                cache.keep(seq, layer, [np.arange(0, length, share) for length in held])
            evicted_at = n
        elif what == "recall" and n > 0:
            cache.retrieve(seq, replace(TURN, budget=data.draw(st.integers(1, 300))))
        elif what == "cut" and n > evicted_at:
            n = data.draw(st.integers(evicted_at, n))
            cache.truncate(seq, n)
            ends = [end for end in ends if end <= n]
        elif what == "branch":
            cache.branch(seq, (seq + 1) % 3)
            seq = (seq + 1) % 3
        if n == 0:
            continue
        assert cache.archive_table(seq)[:, 1].tolist() == ends and cache.archived(seq).n_lost == 0
        missing = 0
        for layer in range(2):
            for positions in cache.positions(seq, layer):
                missing += n - len(positions)
                assert set(range(ends[-1] if ends else 0, n)) <= set(positions.tolist())
        if data.draw(st.booleans(), label="ask"):
            logits_of(context, seq, [tokens[-1]], n)
            step = cache.retrieve(seq, TURN)
            cache.truncate(seq, n)
            assert step.n_recalled == missing / 4


def test_an_archive_that_cannot_be_made_or_written(archived: Archived, tmp_path: Path) -> None:
    _, cache, _ = archived()
    with pytest.raises(KVError, match="No archive can be written in .*nowhere: not a folder to write to"):
        cache.archive_to(1, tmp_path / "nowhere")
    with pytest.raises(KVError, match="has one format"):
        cache.archive_to(0, tmp_path, "q8")


def test_a_full_disk_costs_what_has_no_room(archived: Archived, open_context: OpenContext) -> None:
    context, cache, tokens = archived()
    size = cache.archived(0).bytes
    cache.truncate(0, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        read(context, cache, tokens)
        found = cache.archived(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < found.n_lost < len(ENDS) and "cannot be written: File too large" in found.error
    keep_only(cache, 0, np.arange(150, N))
    assert 0 < cache.retrieve(0, TURN).n_recalled < 150
    # an empty sequence begins anew
    cache.truncate(0, 0)
    read(context, cache, tokens)
    assert cache.archived(0).n_lost == 0 and not cache.archived(0).error


def test_a_file_has_no_name(archived: Archived, tmp_path: Path) -> None:
    archived()
    assert list(tmp_path.iterdir()) == [] and len(files()) == 1
