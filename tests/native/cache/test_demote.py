"""Slots stored in fewer bits: what is read back, what attention makes of it, and that nothing else notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlocal.doctor.rows import decode_rows, encode_rows
from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.formats import FORMATS

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
GROUP = 3
ROWS = {
    **{name: (name, name) for name in ("q8", "q4", "kv2", "token2")},
    **{"kv3": ("kv3", "kv2"), "kivi": ("kivi2-32-k", "kivi2-32")},
}
BITS = {"f16": 16, "q8": 8.5, "q4": 4.5, "kv3": 2.75, "kv2": 2.25, "kivi": 3, "token2": 2.375}


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def hadamard(x: np.ndarray) -> np.ndarray:
    """Rows times the orthonormal Walsh-Hadamard matrix of 64."""
    h = np.ones((1, 1))
    while len(h) < 64:
        h = np.block([[h, h], [h, -h]])
    return (x.astype(np.float64) @ h / 8).astype(np.float32)


def stored(x: np.ndarray, row: str, mu: np.ndarray | float = 0.0, *, rotate: bool) -> np.ndarray:
    """What comes back of rows ``[n, 64]``."""
    inner = hadamard(x) if rotate else x
    out = decode_rows(row, encode_rows(row, inner - mu)) + mu
    return hadamard(out) if rotate else out


def open_all(open_model: OpenModel, open_context: OpenContext, **config: Any) -> Context:
    return open_context(open_model("llama", **SHAPE), **({"formats": FORMATS[1:], "n_seq_max": 2} | config))


def demote(cache: PagedCache, slots: np.ndarray, storage: str, seq: int = 0) -> None:
    for layer in range(2):
        cache.demote(seq, layer, [slots, slots], storage)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("storage", FORMATS[1:])
def test_demoted_slots_are_what_their_rows_can_hold(
    storage: str, rotate: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    context = open_all(open_model, open_context, rotate=rotate)
    cache = paged(context)
    context.decode(random_tokens(context.model, 150), 0, 0)
    before = [cache.keys_values(0, layer, 1) for layer in range(2)]
    slots = np.r_[3:40, 64:91]  # two groups of kivi
    demote(cache, slots, storage)
    rest = np.setdiff1d(np.arange(150), slots)
    for layer, (k, v) in enumerate(before):
        assert all(np.array_equal(p, np.arange(150)) for p in cache.positions(0, layer))
        for row, was, now in zip(ROWS[storage], (k, v), cache.keys_values(0, layer, 1), strict=True):
            scale = np.abs(was).max()
            np.testing.assert_allclose(now[rest], was[rest], rtol=0, atol=1e-6 * scale)
            wanted = stored(was[slots], row, rotate=rotate)
            # a value at the border of two levels may fall to either side after a rotation there and back
            assert (np.abs(now[slots] - wanted) > 1e-3 * scale).mean() < 0.02
    held = 2 * 2 * (len(rest) * BITS["f16"] + len(slots) * BITS[storage]) * 128 / 8
    assert cache.seq_stats(0).used_bytes == held == cache.stats().used_bytes
    assert cache.seq_stats(0).n_slots == 2 * 2 * 150


def test_a_rotation_changes_nothing_but_rounding(open_model: OpenModel, open_context: OpenContext) -> None:
    """Not what attention gives, and not what is read: keys, values and queries come back as the model made them."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 200)
    runs = []
    for rotate in (False, True):
        context = open_context(model, rotate=rotate, n_window=16)
        cache = paged(context)
        context.decode(tokens[:199], 0, 0)
        context.decode(tokens[199:], 199, 0)
        runs.append(
            (context.logits()[0], cache.queries(0, 0, 9), *cache.keys_values(0, 0, 1), cache.window_scores(0, 1))
        )
    for plain, rotated in zip(*runs, strict=True):
        np.testing.assert_allclose(rotated, plain, atol=2e-3 * np.abs(plain).max())


@pytest.mark.parametrize(
    ("storage", "error"),
    [("q8", 0.01), ("q4", 0.12), ("kv3", 0.35), ("kv2", 0.5), ("kivi", 0.5), ("token2", 0.5)],
)
@pytest.mark.parametrize("n_new", [1, 40])
def test_attention_reads_pages_of_all_formats(
    storage: str, error: float, n_new: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """The next tokens see nearly what they would have seen, one by one and in a batch; the weights to the letter."""
    context = open_all(open_model, open_context, rotate=True, n_window=64)
    cache = paged(context)
    cache.accumulate_mass()
    tokens = random_tokens(context.model, 300 + n_new)
    context.decode(tokens[:300], 0, 0)
    context.branch(0, 1)
    demote(cache, np.arange(4, 260), storage, seq=1)
    logits = []
    for seq in (0, 1):
        cache.set_mass(seq, 0, np.zeros((6, 300)))
        context.decode(tokens[300:], 300, seq)
        logits.append(context.logits()[0])
    exact, got = logits
    assert 0 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < error
    q = cache.queries(1, 0, n_new).astype(np.float64)
    mass = cache.mass(1, 0)
    for h in range(SHAPE["n_head"]):
        k = cache.keys_values(1, 0, h // GROUP)[0].astype(np.float64)
        z = q[:, h] @ k.T * SHAPE["head_dim"] ** -0.5
        z[np.arange(300 + n_new)[None, :] > 300 + np.arange(n_new)[:, None]] = -np.inf
        p = np.exp(z - z.max(1, keepdims=True))
        np.testing.assert_allclose(mass[h], (p / p.sum(1, keepdims=True)).sum(0), rtol=2e-3, atol=1e-5)
        if n_new > 1:
            scores = cache.window_scores(1, 0, n_new)[h]
            np.testing.assert_allclose(scores, (p / p.sum(1, keepdims=True)).mean(0), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("rotate", [False, True])
def test_keys_with_an_offset_need_their_mean_taken(
    rotate: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    context = open_all(open_model, open_context, rotate=rotate)
    cache = paged(context)
    context.decode([7] * 120, 0, 0)  # equal tokens: in channels that turn slowly their keys are one large offset
    lost = []
    for centred in (False, True):
        context.branch(0, 1)
        before = cache.keys_values(1, 0, 0)[0]
        mu = np.array([cache.keys_values(1, 0, h)[0].mean(0) for h in range(2)])
        if centred:
            for layer in range(2):
                cache.set_mu(1, layer, mu)
        demote(cache, np.arange(100), "kv2", seq=1)
        now = cache.keys_values(1, 0, 0)[0]
        inner = hadamard(mu[:1])[0] if rotate else mu[0]
        wanted = stored(before[:100], "kv2", inner if centred else 0.0, rotate=rotate)
        assert (np.abs(now[:100] - wanted) > 1e-3 * np.abs(before).max()).mean() < 0.02
        lost.append(np.linalg.norm(now - before))
        with pytest.raises(KVError, match="stored without the mean"):
            cache.set_mu(1, 0, mu)
    assert lost[1] < 0.95 * lost[0]


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_stays_never_drifts(data: st.DataObject, open_model: OpenModel, open_context: OpenContext) -> None:
    """Appending, evicting, demoting other slots, branching and cutting leave every slot's values as they are."""
    context = open_all(open_model, open_context)
    cache = paged(context)
    tokens = random_tokens(context.model, 400)
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    context.decode(tokens[:120], 0, 0)

    def read(seq: int) -> dict[tuple[int, int], Any]:
        out = {}
        for layer in range(2):
            for h, positions in enumerate(cache.positions(seq, layer)):
                k, v = cache.keys_values(seq, layer, h)
                assert len(k) == len(positions) and (np.diff(positions) > 0).all()
                out[layer, h] = {int(p): (k[i], v[i]) for i, p in enumerate(positions)}
        return out

    for action in draw(st.lists(st.sampled_from(["decode", "demote", "keep", "cut", "branch"]), max_size=9)):
        before, n_seen = read(0), context.n_seen(0)
        moved: set[tuple[int, int, int]] = set()
        if action == "decode":
            n = int(rng.integers(1, 40))
            context.decode(tokens[n_seen : n_seen + n], n_seen, 0)
        elif action == "cut":
            context.truncate(0, int(rng.integers(1, n_seen + 1)))
        elif action == "branch":
            context.branch(0, 1)
            other = read(1)
        else:
            storage = rng.choice([name for name in FORMATS[1:] if name != "kivi"])
            for layer in range(2):
                lengths = cache.lengths(0, layer)
                if action == "keep":
                    n = [max(1, int(x * rng.uniform(0.3, 1))) for x in lengths]
                    cache.keep(0, layer, [np.sort(rng.permutation(x)[:m]) for x, m in zip(lengths, n, strict=True)])
                    continue
                slots = [np.sort(rng.permutation(x)[: rng.integers(0, x + 1)]) for x in lengths]
                for h, chosen in enumerate(slots):
                    moved |= {(layer, h, int(p)) for p in cache.positions(0, layer)[h][chosen]}
                cache.demote(0, layer, slots, storage)
        for (layer, h), found in read(0).items():
            for p, (k, v) in found.items():
                if p in before[layer, h] and (layer, h, p) not in moved:
                    np.testing.assert_array_equal(k, before[layer, h][p][0])
                    np.testing.assert_array_equal(v, before[layer, h][p][1])
        if action == "branch":
            context.truncate(0, 0)
            for key, found in read(1).items():
                for p, (k, _) in found.items():
                    np.testing.assert_array_equal(k, other[key][p][0])
            context.branch(1, 0)
            context.truncate(1, 0)
        stats = cache.stats()
        assert stats.used_bytes == cache.seq_stats(0).used_bytes <= stats.allocated_bytes <= stats.peak_bytes
    context.truncate(0, 0)
    assert cache.stats().used_bytes == cache.stats().allocated_bytes == 0


@pytest.mark.parametrize("storage", ["q8", "token2"])
def test_branches_fill_the_page_that_they_shared_each_for_itself(
    storage: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    context = open_all(open_model, open_context)
    cache = paged(context)
    context.decode(random_tokens(context.model, 100), 0, 0)
    before = cache.keys_values(0, 0, 0)[0]
    demote(cache, np.arange(10), storage)
    context.branch(0, 1)
    demote(cache, np.arange(10, 30), storage, seq=0)
    demote(cache, np.arange(50, 70), storage, seq=1)
    for seq, slots in ((0, np.r_[0:30]), (1, np.r_[0:10, 50:70])):
        wanted = before.copy()
        wanted[slots] = stored(before[slots], storage, rotate=False)
        np.testing.assert_array_equal(cache.keys_values(seq, 0, 0)[0], wanted)


def test_a_shared_page_that_is_filled_up_needs_a_page_more(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_all(open_model, open_context, formats=("q8",), n_pool_ctx=32, n_seq_max=3)
    cache = paged(context)
    context.decode(random_tokens(context.model, 20), 0, 0)
    demote(cache, np.arange(10), "q8")
    context.branch(0, 1)
    with pytest.raises(KVError, match="pool is full: 2 pages needed, 0 free"):
        for n in range(0, 1000, 32):
            context.decode(random_tokens(context.model, 32), n, 2)
            demote(cache, np.arange(n, n + 32), "q8", seq=2)
    with pytest.raises(KVError, match="pool is full: 2 pages needed, 0 free"):
        demote(cache, np.arange(10, 15), "q8")
    assert (cache.slot_formats(0, 0)[0] != 0).sum() == 10
    context.truncate(1, 0)
    demote(cache, np.arange(10, 15), "q8")
    assert (cache.slot_formats(0, 0)[0] != 0).sum() == 15


def test_a_window_query_does_not_see_what_came_after_it_however_that_is_stored(
    open_model: OpenModel, open_context: OpenContext
) -> None:
    context = open_all(open_model, open_context, formats=("q8", "kv2"), rotate=True, n_window=200)
    cache = paged(context)
    context.decode(random_tokens(context.model, 300), 0, 0)
    demote(cache, np.r_[5:40, 150:290:3], "kv2")
    demote(cache, np.r_[101:130, 200:280], "q8")
    keep = np.setdiff1d(np.arange(300), np.r_[60:80, 190:210])
    for layer in range(2):
        cache.keep(0, layer, [keep, keep])
        queries, scores = cache.queries(0, layer, 200), cache.window_scores(0, layer)
        later = keep[None, :] > np.arange(100, 300)[:, None]
        for h in range(6):
            keys = cache.keys_values(0, layer, h // GROUP)[0]
            logits = queries[:, h] @ keys.T * cache.layers[layer].kq_scale
            logits[later] = -np.inf
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            np.testing.assert_allclose(scores[h], (p / p.sum(axis=1, keepdims=True)).mean(axis=0), atol=2e-5)


def test_what_cannot_be_done_is_refused(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_all(open_model, open_context, formats=("q8",), n_window=16)
    cache = paged(context)
    context.decode(random_tokens(context.model, 60), 0, 0)
    with pytest.raises(KVError, match="Format 2 was not asked for"):
        demote(cache, np.arange(4), "q4")
    with pytest.raises(KVError, match="ascending and below 60"):
        demote(cache, np.array([3, 60]), "q8")
    demote(cache, np.arange(50), "q8")
    with pytest.raises(KVError, match="cannot be given other positions"):
        cache.roll(0)
    with pytest.raises(KVError, match=r"--kv\) need the page kernels, which a portable context does without; use "):
        open_all(open_model, open_context, portable=True)
    model = open_model("llama", **(SHAPE | {"head_dim": 80}))
    with pytest.raises(KVError, match="Heads of 80 and 80 values cannot be stored in blocks of 32"):
        open_context(model, formats=("q8",))


@pytest.mark.parametrize("rotate", [False, True])
def test_the_mean_is_that_of_the_keys_at_the_positions(
    rotate: bool, open_model: OpenModel, open_context: OpenContext
) -> None:
    """What is demoted after it is what it would be with the same mean set by hand."""
    by_hand, taken = (open_all(open_model, open_context, rotate=rotate) for _ in range(2))
    keep = np.r_[0:20, 25:150]
    for context in (by_hand, taken):
        context.decode(random_tokens(context.model, 150), 0, 0)
        for layer in range(2):
            paged(context).keep(0, layer, [keep, keep[::2]])
    assert [paged(taken).centre(0, layer, 10, 100, 86) for layer in range(2)] == [85, 85]
    for layer in range(2):
        cache = paged(by_hand)
        heads = zip(cache.positions(0, layer), range(2), strict=True)
        means = [cache.keys_values(0, layer, h)[0][(p >= 10) & (p < 100)].mean(axis=0) for p, h in heads]
        cache.set_mu(0, layer, np.array(means))
        assert paged(taken).centre(0, layer, 10, 100, 85) == 85
        # with a mean set nothing happens
        assert paged(taken).centre(0, layer, 120, 121, 64) == 64
    for context in (by_hand, taken):
        demote(paged(context), np.arange(40), "q8")
    for layer in range(2):
        for h in range(2):
            a, b = (paged(context).keys_values(0, layer, h)[0] for context in (by_hand, taken))
            np.testing.assert_allclose(a, b, atol=1e-4)
    by_hand.truncate(0, 0)
    taken.truncate(0, 0)
    taken.decode(random_tokens(taken.model, 90), 0, 0)
    assert paged(taken).centre(0, 0, 0, 90, 64) == 90, "a sequence that was emptied has no mean"


def test_value_norms_are_those_of_the_values(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_all(open_model, open_context, rotate=True)
    cache = paged(context)
    context.decode(random_tokens(context.model, 100), 0, 0)
    demote(cache, np.r_[3:20, 50:60], "kv2")
    for layer in range(2):
        cache.keep(0, layer, [np.arange(5, 90), np.arange(0, 100, 3)])
        for h, norms in enumerate(cache.value_norms(0, layer)):
            wanted = np.linalg.norm(cache.keys_values(0, layer, h)[1], axis=1)
            np.testing.assert_allclose(norms, wanted, rtol=1e-4)
