"""kivi pages: groups of slots that are stored together. They are taken and freed whole, and never change in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from dense_llama import DenseLlama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kivi import HEADS, SHAPE, both, fill, open_kivi, read, stored

from kvlocal.doctor.rows import decode_rows, encode_rows
from kvlocal.native.cache import PagedCache
from kvlocal.native.formats import FORMATS

KINDS = [(bits, group) for bits in (2, 4) for group in (32, 64)]
F16_BYTES = 2 * 2 * 64
KIVI = FORMATS.index("kivi")


def slot_bytes(bits: int, group: int) -> float:
    """Of K and V of a slot: the codes, and a scale and a zero per group."""
    return 2 * 64 * (bits + 32 / group) / 8


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_each_group_is_the_next_slots_in_order(
    bits: int, group: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Twice, with slots that are no neighbours and different ones in every head; the bytes to the last."""
    context, cache = open_kivi(open_model, open_context, kivi_bits=bits, kivi_group=group)
    context.decode(random_tokens(context.model, 300), 0, 0)
    wanted = read(cache, 0)
    rng = np.random.default_rng(0)
    chosen = {at: np.sort(rng.permutation(280)[: group * (2 + head)]) for at in HEADS for head in at[1:]}
    for part in (slice(0, group), slice(group, None)):
        for at, slots in chosen.items():
            k, v = (np.array(x) for x in zip(*(wanted[at][p] for p in slots[part]), strict=True))
            wanted[at] |= zip(slots[part].tolist(), zip(*stored(k, v, bits, group), strict=True), strict=True)
        for layer in range(2):
            slots = [chosen[layer, head][part] for head in range(2)]
            if part.start:  # those that are there already make no difference
                slots = [chosen[layer, head] for head in range(2)]
            cache.demote(0, layer, slots, "kivi")
    for at, found in read(cache, 0).items():
        assert sorted(found) == list(range(300))
        for p, (k, v) in found.items():
            np.testing.assert_array_equal(k, wanted[at][p][0])
            np.testing.assert_array_equal(v, wanted[at][p][1])
    n_kivi = sum(map(len, chosen.values()))
    stats = cache.seq_stats(0)
    assert stats.used_bytes == (1200 - n_kivi) * F16_BYTES + n_kivi * slot_bytes(bits, group)
    pages = sum(-(-(300 - len(slots)) // 32) for slots in chosen.values())
    assert stats.page_bytes == pages * 32 * F16_BYTES + n_kivi * slot_bytes(bits, group)
    assert cache.stats().allocated_bytes == stats.page_bytes and cache.stats().used_bytes == stats.used_bytes


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_group_is_freed_with_its_last_slot(
    bits: int, group: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    context, cache = open_kivi(open_model, open_context, kivi_bits=bits, kivi_group=group)
    context.decode(random_tokens(context.model, 200), 0, 0)
    both(cache, "demote", np.arange(3 * group), 0, "kivi")
    each = slot_bytes(bits, group)
    tail = 4 * (200 - 3 * group)
    before = read(cache, 0)

    def held(kivi: list[int], groups: int) -> None:
        n = 200 - 3 * group
        stats = cache.seq_stats(0)
        assert stats.used_bytes == tail * F16_BYTES + 4 * len(kivi) * each
        assert stats.page_bytes == 4 * (-(-n // 32) * 32 * F16_BYTES + groups * group * each)
        assert stats.page_bytes == cache.stats().allocated_bytes
        for at, found in read(cache, 0).items():
            assert sorted(found) == [*kivi, *range(3 * group, 200)]
            for p, (k, v) in found.items():
                np.testing.assert_array_equal(k, before[at][p][0])
                np.testing.assert_array_equal(v, before[at][p][1])

    def keep(kivi: list[int]) -> None:
        positions = cache.positions(0, 0)[0].tolist()
        both(cache, "keep", [positions.index(p) for p in [*kivi, *range(3 * group, 200)]])

    some = [*range(0, group, 3), group + 5, *range(2 * group, 3 * group, 7)]
    for kivi, groups in ((some, 3), ([p for p in some if p != group + 5], 2), ([2 * group], 1), ([], 0)):
        keep(kivi)
        held(kivi, groups)
    assert all((groups == -1).all() for groups in cache.kivi_groups(0, 0))


def test_holes_stay_holes(open_model: OpenModel, open_context: OpenContext) -> None:
    """What is demoted or decoded later never goes where a slot was dropped, not even at the end of the last group."""
    context, cache = open_kivi(open_model, open_context)
    tokens = random_tokens(context.model, 400)
    context.decode(tokens[:200], 0, 0)
    both(cache, "demote", np.arange(64), 0, "kivi")
    both(cache, "keep", np.r_[0:10, 32:40, 64:200])
    kept = read(cache, 0)
    both(cache, "demote", np.arange(18, 18 + 32), 0, "kivi")
    both(cache, "keep", np.arange(1, 18 + 136))
    assert context._llama.llama_memory_seq_pos_min(context._memory, 0) == 1
    context.decode(tokens[200:], 200, 0)
    for layer in range(2):
        for formats, groups in zip(cache.slot_formats(0, layer), cache.kivi_groups(0, layer), strict=True):
            assert ((formats == KIVI) == (groups >= 0)).all()
            assert np.bincount(groups[groups >= 0]).tolist() == [9, 8, 32]
    for at, found in read(cache, 0).items():
        for p in [*range(1, 10), *range(32, 40), *range(96, 200)]:
            np.testing.assert_array_equal(found[p][0], kept[at][p][0])
    assert context.n_seen(0) == 400


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_attention_over_kivi_with_holes_is_that_over_what_is_read(
    bits: int, group: int, centred: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    """One token and a batch, the mass and window scores too, beside pages of token2, q8 and f16; selected or not."""
    context, cache = open_kivi(open_model, open_context, kivi_bits=bits, kivi_group=group, n_outputs=64, n_window=64)
    cache.accumulate_mass()
    tokens = random_tokens(context.model, 340)
    context.decode(tokens[:300], 0, 0)
    if centred:
        for layer in range(2):
            cache.set_mu(0, layer, np.array([cache.keys_values(0, layer, h)[0].mean(0) for h in range(2)]))
    both(cache, "demote", np.arange(3, 3 + 2 * group), 0, "kivi")
    both(cache, "demote", np.arange(150, 190), 0, "token2")
    both(cache, "demote", np.arange(190, 230), 0, "q8")
    rng = np.random.default_rng(0)
    for layer in range(2):
        cache.keep(0, layer, [np.sort(np.r_[rng.permutation(230)[: 100 + 20 * h], 230:300]) for h in range(2)])
    dense = DenseLlama(context.model.path, **SHAPE)
    for selected in (True, False):
        seen = {at: cache.keys_values(0, *at) for at in HEADS}
        for layer in range(2) if selected else ():
            slots = [np.sort(rng.permutation(n)[:80]) for n in cache.lengths(0, layer)]
            cache.select(0, layer, slots)
            seen |= {(layer, h): tuple(x[slots[h]] for x in seen[layer, h]) for h in range(2)}
        want = dense.step(int(tokens[300]), 300, lambda layer, h, seen=seen: seen[layer, h])
        context.decode(tokens[300:301], 300, 0)
        assert np.abs(context.logits()[0] - want).max() <= 2e-3 * np.ptp(want)
        context.truncate(0, 300)
        for layer in range(2):
            cache.select(0, layer, None)
            cache.set_mass(0, layer, np.zeros((4, 200)))
    context.decode(tokens[300:], 300, 0, outputs="all")
    batch = context.logits(40)
    q = cache.queries(0, 0, 40).astype(np.float64)
    mass, scores = cache.mass(0, 0), cache.window_scores(0, 0, 40)
    for h in range(4):
        k = cache.keys_values(0, 0, h // 2)[0].astype(np.float64)
        n = len(k) - 40
        z = q[:, h] @ k.T / 8
        z[np.arange(n + 40)[None, :] > n + np.arange(40)[:, None]] = -np.inf
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(mass[h, : n + 40], p.sum(0), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(scores[h, : n + 40], p.mean(0), rtol=2e-3, atol=1e-6)
    context.truncate(0, 300)
    rows = []
    for i in range(300, 340):
        context.decode(tokens[i : i + 1], i, 0)
        rows.append(context.logits()[0])
    assert np.abs(batch - np.array(rows)).max() <= 1e-3 * np.ptp(batch)


@pytest.mark.parametrize("group", [32, 64])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_stored_never_drifts(
    group: int, data: st.DataObject, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Two sequences that branch, with kivi beside f16 and others: every slot keeps its bits from when it was stored."""
    context, cache = open_kivi(open_model, open_context, kivi_group=group, n_pool_ctx=600)
    tokens = random_tokens(context.model, 600)
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    context.decode(tokens[:200], 0, 0)
    wanted = {0: read(cache, 0), 1: read(cache, 1)}
    actions = st.sampled_from(["decode", "kivi", "kivi", "q8", "keep", "groups", "cut", "branch"])
    for action, seq in data.draw(st.lists(st.tuples(actions, st.integers(0, 1)), max_size=12)):
        n_seen = context.n_seen(seq)
        if action == "branch":
            context.branch(seq, 1 - seq)
            wanted[1 - seq] = {at: dict(slots) for at, slots in wanted[seq].items()}
        elif action == "decode":
            n = int(rng.integers(1, 80))
            if n_seen + n <= 600:
                context.decode(tokens[n_seen : n_seen + n], n_seen, seq)
                for at, found in read(cache, seq).items():
                    wanted[seq][at] |= {p: kv for p, kv in found.items() if p >= n_seen}
        elif n_seen == 0:
            continue
        elif action == "cut":
            n = int(rng.integers(n_seen // 2, n_seen + 1))
            context.truncate(seq, n)
            wanted[seq] = {at: {p: kv for p, kv in slots.items() if p < n} for at, slots in wanted[seq].items()}
        else:
            for layer in range(2):
                change(cache, seq, layer, action, rng, wanted[seq], group)
        for s in (0, 1):
            check(cache, s, wanted[s], group)
    context.truncate(0, 0)
    check(cache, 1, wanted[1], group)
    context.truncate(1, 0)
    assert cache.stats().used_bytes == cache.stats().allocated_bytes == 0


def change(
    cache: PagedCache, seq: int, layer: int, action: str, rng: np.random.Generator, wanted: dict[Any, Any], group: int
) -> None:
    """Demote or keep a random part of a layer, and note in ``wanted`` what must come of it."""
    chosen = []
    for head, (positions, formats) in enumerate(
        zip(cache.positions(seq, layer), cache.slot_formats(seq, layer), strict=True)
    ):
        at, n = wanted[layer, head], len(positions)
        if action == "keep":
            chosen.append(np.sort(rng.permutation(n)[: max(1, int(n * rng.uniform(0.2, 1)))]))
        elif action == "groups":  # all slots of one group go, or all but one
            groups = cache.kivi_groups(seq, layer)[head]
            goes = np.flatnonzero(groups == groups.max())[int(rng.integers(2)) :] if groups.max() >= 0 else []
            chosen.append(np.setdiff1d(np.arange(n), goes if len(goes) < n else []))
        else:
            free = np.flatnonzero(formats != KIVI)
            count = int(rng.integers(len(free) + 1))
            count -= count % group if action == "kivi" else 0
            chosen.append(np.sort(rng.permutation(free)[:count]))
            moved = positions[chosen[-1]].tolist()
            if action == "kivi" and moved:
                k, v = (np.array(x) for x in zip(*(at[p] for p in moved), strict=True))
                at |= zip(moved, zip(*stored(k, v, 2, group), strict=True), strict=True)
            for p in moved if action == "q8" else []:
                at[p] = tuple(decode_rows("q8", encode_rows("q8", x[None]))[0] for x in at[p])
        if action in ("keep", "groups"):
            kept = set(positions[chosen[-1]].tolist())
            wanted[layer, head] = {p: kv for p, kv in at.items() if p in kept}
    if action in ("keep", "groups"):
        cache.keep(seq, layer, chosen)
    else:
        cache.demote(seq, layer, chosen, action)


def check(cache: PagedCache, seq: int, wanted: dict[Any, Any], group: int) -> None:
    for at, found in read(cache, seq).items():
        assert sorted(found) == sorted(wanted[at])
        for p, (k, v) in found.items():
            np.testing.assert_array_equal(k, wanted[at][p][0])
            np.testing.assert_array_equal(v, wanted[at][p][1])
    each = {"f16": F16_BYTES, "q8": 136, "kivi": slot_bytes(2, group)}
    used = pages = 0.0
    for layer in range(2):
        for formats, groups, at in zip(
            cache.slot_formats(seq, layer), cache.kivi_groups(seq, layer), cache.slot_pages(seq, layer), strict=True
        ):
            used += sum(each[name] * (formats == FORMATS.index(name)).sum() for name in each)
            pages += len(set(groups[groups >= 0])) * group * each["kivi"]
            pages += sum(32 * each[name] * len(set(at[formats == FORMATS.index(name)])) for name in ("f16", "q8"))
            for number in set(groups[groups >= 0]):
                assert (formats[groups == number] == KIVI).all() and (groups == number).sum() <= group
    stats, total = cache.seq_stats(seq), cache.stats()
    assert (stats.used_bytes, stats.page_bytes) == (used, pages)
    assert stats.used_bytes <= total.used_bytes <= total.allocated_bytes <= total.peak_bytes


@pytest.mark.parametrize("group", [32, 64])
def test_branches_share_groups_and_need_no_copies(group: int, open_model: OpenModel, open_context: OpenContext) -> None:
    """Each keeps its half of the same groups; with no page to spare. What is in both halves counts once."""
    context, cache = open_kivi(open_model, open_context, kivi_group=group, n_ctx=256, n_seq_max=3)
    context.decode(random_tokens(context.model, 128), 0, 0)
    both(cache, "demote", np.arange(128), 0, "kivi")
    context.branch(0, 1)
    fill(context, cache, 2, group)
    taken = cache.stats()
    before = read(cache, 0)
    both(cache, "keep", np.arange(0, 80), 0)
    both(cache, "keep", np.arange(70, 128), 1)
    assert cache.stats().allocated_bytes == taken.allocated_bytes, "nothing was copied, no group is without an owner"
    assert cache.stats().used_bytes == taken.used_bytes, "all slots are held, ten of them twice"
    for seq, kept in ((0, range(80)), (1, range(70, 128))):
        for at, found in read(cache, seq).items():
            assert sorted(found) == list(kept)
            for p in kept:
                np.testing.assert_array_equal(found[p][0], before[at][p][0])
    context.truncate(0, 0)
    freed = taken.allocated_bytes - cache.stats().allocated_bytes
    assert freed == 4 * 64 * slot_bytes(2, group), "positions 0 to 63 were its own"


def test_groups_are_counted_behind_pages_of_token2(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_kivi(open_model, open_context, kivi_group=64)
    context.decode(random_tokens(context.model, 300), 0, 0)
    both(cache, "demote", np.arange(100, 228), 0, "kivi")
    both(cache, "demote", np.arange(33), 0, "token2")  # two pages
    both(cache, "keep", np.r_[0:33, 100, 163:300])  # a slot of the first page of a group, another of its second
    groups = cache.kivi_groups(0, 0)[1]
    np.testing.assert_array_equal(groups, [*[-1] * 33, 0, 0, *[1] * 64, *[-1] * 72])


@pytest.mark.parametrize("storage", ["kivi", "token2", "q8"])
def test_the_number_of_threads_makes_no_difference(
    storage: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    found = []
    for n_threads in (1, 2, 7):
        context, cache = open_kivi(open_model, open_context, n_threads=n_threads)
        context.decode(random_tokens(context.model, 200), 0, 0)
        if not found:
            first = read(cache, 0)
        for layer in range(2):
            cache.demote(0, layer, [np.arange(96), np.arange(64, 192)], storage)
        found.append(read(cache, 0))
    assert not np.array_equal(found[0][0, 1][100][0], first[0, 1][100][0])
    for other in found[1:]:
        for at in HEADS:
            for p, (k, v) in found[0][at].items():
                np.testing.assert_array_equal(other[at][p][0], k)
                np.testing.assert_array_equal(other[at][p][1], v)
