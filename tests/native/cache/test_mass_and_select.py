"""Accumulated attention mass, and slots that attention sees or does not see."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import within

from kvlocal.errors import KVError, UsageError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context

SHAPE = {"n_layer": 2, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
GROUP = 3


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def received(cache: PagedCache, layer: int, n: int, seq: int = 0) -> np.ndarray:
    """Mass from the stored keys and all queries, in f64: ``[n_head, n]``."""
    q = cache.queries(seq, layer, n).astype(np.float64)
    out = []
    for h in range(SHAPE["n_head"]):
        k = cache.keys_values(seq, layer, h // GROUP)[0].astype(np.float64)
        z = q[:, h] @ k.T * SHAPE["head_dim"] ** -0.5
        z[np.arange(n)[None, :] > np.arange(len(q))[:, None]] = -np.inf
        p = np.exp(z - z.max(1, keepdims=True))
        out.append((p / p.sum(1, keepdims=True)).sum(0))
    return np.array(out)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("n_ubatch", [1, 7, 40, 512])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_mass_is_the_sum_over_all_queries(
    n_ubatch: int, n_threads: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Single tokens, few and many queries per step: the same sum."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 200)
    context = open_context(model, n_window=200, n_ubatch=n_ubatch, n_threads=n_threads)
    cache = paged(context)
    cache.accumulate_mass()
    context.decode(tokens[:197], 0, 0)
    for i in range(197, 200):
        context.decode(tokens[i : i + 1], i, 0)
    for layer in range(2):
        np.testing.assert_allclose(cache.mass(0, layer), received(cache, layer, 200), rtol=1e-3, atol=1e-5)


@pytest.mark.needs_kernels
def test_mass_of_two_sequences_in_one_batch(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_window=64, n_seq_max=2)
    cache = paged(context)
    cache.accumulate_mass()
    tokens = np.concatenate([random_tokens(model, 50, 1), random_tokens(model, 30, 2)])
    context.decode(tokens, np.r_[0:50, 0:30], np.repeat([0, 1], [50, 30]))
    for seq, n in ((0, 50), (1, 30)):
        np.testing.assert_allclose(cache.mass(seq, 1), received(cache, 1, n, seq), rtol=1e-3, atol=1e-5)


@pytest.mark.needs_kernels
def test_the_logits_do_not_change(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 120)
    logits = []
    for kind in ("none", "sum", "last"):
        context = open_context(model)
        paged(context).accumulate_mass(kind)
        context.decode(tokens[:119], 0, 0)
        context.decode(tokens[119:], 119, 0)
        logits.append(context.logits()[0])
    for other in logits[1:]:
        np.testing.assert_allclose(logits[0], other, rtol=0, atol=1e-5 * np.abs(logits[0]).max())


@pytest.mark.needs_kernels
def test_mass_goes_where_its_slot_goes(open_model: OpenModel, open_context: OpenContext) -> None:
    """Eviction, branches and truncation carry it along; writing replaces it; a new slot starts at nothing."""
    model = open_model("llama", **SHAPE)
    context = open_context(model, n_seq_max=2)
    cache = paged(context)
    cache.accumulate_mass()
    context.decode(random_tokens(model, 100), 0, 0)
    before = cache.mass(0, 0)
    slots = [np.r_[0:3, 50:90], np.r_[10:100:2]]
    cache.branch(0, 1)
    cache.keep(0, 0, slots)
    after = cache.mass(0, 0)
    for h in range(6):
        s = slots[h // GROUP]
        np.testing.assert_array_equal(after[h, : len(s)], before[h, s])
        assert not after[h, len(s) :].any()
    np.testing.assert_array_equal(cache.mass(1, 0), before)
    cache.truncate(1, 60)
    np.testing.assert_array_equal(cache.mass(1, 0), before[:, :60])
    cache.set_mass(1, 0, np.full((6, 60), 7.0))
    context.decode([5], 60, 1)
    grown = cache.mass(1, 0)
    np.testing.assert_allclose((grown[:, :60] - 7.0).sum(1) + grown[:, 60], 1.0, rtol=1e-3)
    cache.accumulate_mass()
    assert not cache.mass(1, 0).any()


@pytest.mark.needs_kernels
def test_mass_is_refused_where_it_is_not_kept(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    with pytest.raises(UsageError, match="needs the page kernels, which a portable context does without; use "):
        paged(open_context(model, portable=True)).accumulate_mass()
    context = open_context(model)
    context.decode(random_tokens(model, 9), 0, 0)
    with pytest.raises(KVError, match="kvl_set_mass"):
        paged(context).mass(0, 0)
    paged(context).accumulate_mass()
    with pytest.raises(KVError, match="9 slots, the array has room for 8"):
        paged(context).set_mass(0, 0, np.zeros((6, 8)))


@pytest.mark.parametrize("portable", [False, True])
def test_select_sees_what_keeping_would_leave(portable: bool, open_model: OpenModel, open_context: OpenContext) -> None:
    """Ragged selections, several new tokens; afterwards everything is seen again."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 230)
    context = open_context(model, n_seq_max=3, portable=portable)
    cache = paged(context)
    context.decode(tokens[:200], 0, 0)
    cache.branch(0, 1)
    cache.branch(0, 2)
    rng = np.random.default_rng(3)
    for layer in range(2):
        slots = [np.sort(rng.choice(200, n, replace=False)) for n in (40, 90)]
        slots[0][0] = 0
        cache.select(0, layer, slots)
        cache.keep(1, layer, slots)

    def step(seq: int, part: np.ndarray, pos: int) -> np.ndarray:
        context.decode(part, pos, seq)
        return context.logits()[0]

    for part, pos in ((tokens[200:201], 200), (tokens[201:229], 201), (tokens[229:], 229)):
        selected, kept, full = (step(seq, part, pos) for seq in range(3))
        scale = full.max() - full.min()
        assert np.abs(selected - kept).max() <= within(1e-3) * scale
        assert np.abs(selected - full).max() > 1e-2 * scale
    for seq in (0, 2):
        cache.truncate(seq, 200)
    for layer in range(2):
        cache.select(0, layer, None)
    assert np.abs(step(0, tokens[200:], 200) - step(2, tokens[200:], 200)).max() <= within(1e-3) * scale


def test_select_checks_its_slots(open_model: OpenModel, open_context: OpenContext) -> None:
    model = open_model("llama", **SHAPE)
    context = open_context(model)
    context.decode(random_tokens(model, 40), 0, 0)
    for slots in ([np.array([40]), np.array([0])], [np.array([3, 3]), np.array([0])]):
        with pytest.raises(KVError, match="ascending and below 40"):
            paged(context).select(0, 0, slots)
    paged(context).select(0, 0, [np.array([], int), np.array([0])])
    context.decode([4], 40, 0)
    assert np.isfinite(context.logits()).all()


CHANGES = ("keep", "keep all", "demote", "truncate", "branch", "save")


@pytest.mark.parametrize("change", CHANGES)
def test_a_selection_goes_with_its_slots(change: str, open_model: OpenModel, open_context: OpenContext) -> None:
    """Attention sees what was selected and has not been dropped since, wherever those slots are now."""
    model = open_model("llama", **SHAPE)
    tokens = random_tokens(model, 151)
    context = open_context(model, n_seq_max=3, formats=("q8",))
    cache = paged(context)
    context.decode(tokens[:150], 0, 0)
    rng = np.random.default_rng(5)
    n = 120 if change == "truncate" else 150
    for layer in range(2):
        chosen = [np.sort(np.append(rng.choice(100, 40, replace=False), n - 1)) for _ in range(2)]
        dropped = [np.sort(rng.choice(149, 50, replace=False)) for _ in range(2)]
        kept = [np.setdiff1d(np.arange(150), one) for one in dropped]
        cache.branch(0, 1) if layer == 0 else None
        cache.select(0, layer, chosen)
        seen = chosen
        if change == "keep":
            cache.keep(0, layer, kept)
            seen = [np.intersect1d(*pair) for pair in zip(chosen, kept, strict=True)]
        elif change == "keep all":
            cache.keep(0, layer, [np.arange(150)] * 2)
        elif change == "demote":
            for seq in (0, 1):
                cache.demote(seq, layer, dropped, "q8")
        cache.keep(1, layer, seen)
    seq = 0
    if change == "truncate":
        context.truncate(0, n)
        context.truncate(1, n)
    elif change == "branch":
        cache.branch(0, 2)
        seq = 2
    elif change == "save":
        context.restore(2, context.save(0))
        seq = 2
    logits = []
    for where in (seq, 1):
        context.decode(tokens[n : n + 1], n, where)
        logits.append(context.logits()[0])
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.ptp(logits[1])
    context.decode(tokens[:1], n + 1, seq)
    hidden = context.logits()[0]
    for layer in range(2):
        cache.select(seq, layer, None)
    context.truncate(seq, n + 1)
    context.decode(tokens[:1], n + 1, seq)
    assert np.abs(context.logits()[0] - hidden).max() > 1e-3 * np.ptp(hidden), "now everything is seen"
