"""Pages on an accelerator, alone or beside others in main memory: they hold and compute what the CPU's do."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from devices import chosen, kl_within, within

from kvlocal.errors import KVError, UsageError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.native.structs import KvlLayerInfo

N_LAYER = 4
SHAPE = {"n_layer": N_LAYER, "n_head": 6, "n_head_kv": 2, "head_dim": 64}
LAYERS_THERE = [0, 2, 3, 99]
"""Values of n_gpu_layers: none of four layers, the last one, the last two, all. The output counts as a layer."""


def paged(context: Context) -> PagedCache:
    assert context.cache is not None
    return context.cache


def on_device(context: Context) -> list[bool]:
    """Per layer, whether its pages lie on the accelerator."""
    cache, out = paged(context), []
    for layer in range(len(cache.layers)):
        info = KvlLayerInfo()
        cache._check(cache._lib.kvl_get_layer(cache._ctx, layer, ctypes.byref(info)))
        out.append(bool(info.on_device))
    return out


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    p, q = (x.astype(np.float64) - x.max() for x in (p_logits, q_logits))
    p, q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    return float((np.exp(p) * (p - q)).sum())


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= within(2e-3) * np.ptp(want)
    assert kl(want, got) < kl_within(1e-5)


def ragged(cache: PagedCache, seq: int, seed: int) -> list[list[np.ndarray]]:
    """Some slots of every head, per layer, each head another number; the first and the last few are among them."""
    rng = np.random.default_rng(seed)
    out = []
    for layer in range(len(cache.layers)):
        n = [len(p) for p in cache.positions(seq, layer)]
        sizes = [int(rng.integers(1, m // 2)) for m in n]
        chosen_at_random = (rng.choice(m, k, replace=False) for m, k in zip(n, sizes, strict=True))
        out.append([np.union1d(np.r_[0:4, m - 20 : m], some) for m, some in zip(n, chosen_at_random, strict=True)])
    return out


@pytest.mark.parametrize("n_there", LAYERS_THERE)
def test_pages_lie_where_their_layers_do(n_there: int, open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama", n_gpu_layers=n_there, **SHAPE))
    n = min(max(n_there - 1, 0), N_LAYER)
    assert on_device(context) == [False] * (N_LAYER - n) + [True] * n
    assert (context.breakdown(on_device=True).context_bytes > 0) == (n > 0)
    assert (context.breakdown().context_bytes > 0) == (n < N_LAYER)


@pytest.mark.parametrize("n_there", LAYERS_THERE[1:])
def test_everything_together_is_what_the_cpu_does(
    n_there: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Prompts of two sequences in one batch, single tokens, ragged evictions, branches, selections, cuts, rolls."""
    cpu, there = (
        open_context(open_model("llama", n_gpu_layers=n, **SHAPE), n_seq_max=4, n_ubatch=64, n_window=16)
        for n in (0, n_there)
    )
    tokens = random_tokens(cpu.model, 400)

    def both(part: np.ndarray, pos: int | np.ndarray, seq: int | np.ndarray, n_outputs: int = 1) -> None:
        rows = []
        for context in (cpu, there):
            context.decode(part, pos, seq)
            rows.append(context.logits(n_outputs))
        for got, want in zip(rows[1], rows[0], strict=True):
            assert_close(got, want)

    def each(what: str, *args: object) -> None:
        for context in (cpu, there):
            getattr(paged(context), what)(*args)

    def same_positions(seq: int) -> None:
        for layer in range(N_LAYER):
            for a, b in zip(paged(cpu).positions(seq, layer), paged(there).positions(seq, layer), strict=True):
                np.testing.assert_array_equal(a, b)

    def same_contents(seq: int) -> None:
        for layer in range(N_LAYER):
            scale = 0.0
            for head in range(2):
                for a, b in zip(*(paged(c).keys_values(seq, layer, head) for c in (cpu, there)), strict=True):
                    scale = max(scale, float(np.abs(a).max()))
                    np.testing.assert_allclose(b, a, atol=within(4e-3) * scale)

    def same_scores(seq: int) -> None:
        for layer in range(N_LAYER):
            a, b = (paged(context).window_scores(seq, layer) for context in (cpu, there))
            np.testing.assert_allclose(b, a, rtol=within(1e-2), atol=within(1e-4))

    # 300 tokens of one and 70 of another, then both go on in one batch
    both(np.r_[tokens[:300], tokens[:70]], np.r_[0:300, 0:70], np.repeat([0, 1], [300, 70]), 2)
    both(tokens[300:302], np.array([300, 70]), np.array([0, 1]), 2)
    same_contents(0)
    same_scores(0)
    # evicted raggedly, in every layer
    for layer, slots in enumerate(ragged(paged(cpu), 0, 1)):
        each("keep", 0, layer, slots)
    same_positions(0)
    same_contents(0)
    same_scores(0)
    both(tokens[302:303], 301, 0)
    both(tokens[303:340], 302, 0)
    # a branch is written, and its source stays
    each("branch", 0, 2)
    each("branch", 0, 3)
    both(tokens[340:345], 339, 2)
    for layer, slots in enumerate(ragged(paged(cpu), 2, 2)):
        each("keep", 2, layer, slots)
    both(tokens[345:346], 344, 2)
    same_contents(0)
    # what is selected is seen, then everything again
    for layer, slots in enumerate(ragged(paged(cpu), 3, 3)):
        each("select", 3, layer, slots)
    both(tokens[340:341], 339, 3)
    both(tokens[341:350], 340, 3)
    for layer in range(N_LAYER):
        each("select", 3, layer, None)
    both(tokens[350:351], 349, 3)
    # the end is cut off, and comes again
    for context in (cpu, there):
        context.truncate(3, 339)
    both(tokens[360:380], 339, 3)
    both(tokens[340:342], 339, 0)
    same_positions(3)
    # renumbered: of equal heads, one of them shared with a branch
    for layer in range(N_LAYER):
        each("keep", 1, layer, [np.r_[0:4, 30:71]] * 2)
    each("branch", 1, 2)
    each("roll", 1)
    same_contents(1)
    same_contents(2)
    both(tokens[380:382], np.array([45, 71]), np.array([1, 2]), 2)
    for context in (cpu, there):
        for seq in range(4):
            context.truncate(seq, 0)
        assert context.stats().used_bytes == context.stats().allocated_bytes == 0


@pytest.mark.parametrize("n_after", LAYERS_THERE)
@pytest.mark.parametrize("n_before", LAYERS_THERE)
def test_a_sequence_is_saved_here_and_restored_there(
    n_before: int, n_after: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    """Pages of a sequence that was evicted, out of a pool with holes, wherever they lie."""
    before, after = (
        open_context(open_model("llama", n_gpu_layers=n, **SHAPE), n_seq_max=2, n_window=16)
        for n in (n_before, n_after)
    )
    tokens = random_tokens(before.model, 230)
    after.decode(tokens[:90], 0, 1)
    before.decode(tokens[:50], 0, 1)
    before.decode(tokens[:200], 0, 0)
    for layer, slots in enumerate(ragged(paged(before), 0, 5)):
        paged(before).keep(0, layer, slots)
    before.truncate(1, 0)
    saved = before.save(0)
    after.restore(0, saved)
    if n_before == n_after:
        assert after.save(0) == saved
    for layer in range(N_LAYER):
        for head in range(2):
            for a, b in zip(*(paged(c).keys_values(0, layer, head) for c in (before, after)), strict=True):
                np.testing.assert_array_equal(a, b)
        a, b = (paged(c).window_scores(0, layer) for c in (before, after))
        np.testing.assert_allclose(b, a, rtol=within(1e-3), atol=within(1e-5))
    for first, last in ((200, 201), (201, 230)):
        for context in (before, after):
            context.decode(tokens[first:last], first, 0)
        assert_close(after.logits()[0], before.logits()[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_does_not_get_in(value: float, open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama", **SHAPE), n_seq_max=2)
    context.decode(random_tokens(context.model, 70), 0, 0)
    damaged = bytearray(context.save(0))
    damaged[-2:] = np.float16(value).tobytes()
    with pytest.raises(KVError, match="no numbers"):
        context.restore(1, damaged)
    assert context.n_seen(1) == 0
    context.truncate(0, 0)
    assert context.stats().allocated_bytes == 0


@pytest.mark.parametrize("config", [{"formats": ("q8",)}, {"rotate": True}, {"mass": "sum"}], ids=str)
@pytest.mark.parametrize("n_there", LAYERS_THERE[1:])
def test_what_needs_kernels_is_refused_where_there_are_none(
    n_there: int, config: dict[str, object], has_kernels: bool, open_model: OpenModel
) -> None:
    model = open_model("llama", n_gpu_layers=n_there, **SHAPE)
    if has_kernels:
        Context(model, ContextConfig(64, n_threads=1, **config)).close()  # type: ignore[arg-type]
        return
    with pytest.raises(UsageError, match="page kernels"):
        Context(model, ContextConfig(64, n_threads=1, **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("n_there", LAYERS_THERE[1:])
def test_a_plan_without_weights_counts_what_the_device_takes(
    n_there: int, open_model: OpenModel, open_context: OpenContext
) -> None:
    model = open_model("llama", n_gpu_layers=n_there, **SHAPE)
    whole = open_context(model, n_ctx=512)
    dry = open_context(Model(model.path, n_gpu_layers=n_there, no_alloc=True), n_ctx=512)
    for there in (False, True):
        a, b = (context.breakdown(on_device=there) for context in (whole, dry))
        assert a.context_bytes == b.context_bytes
    tokens = random_tokens(model, 100)
    for context in (whole, dry):
        context.decode(tokens, 0, 0)
        for layer in range(N_LAYER):
            paged(context).keep(0, layer, [np.r_[0:10, 50:100]] * 2)
    assert whole.stats().used_bytes == dry.stats().used_bytes


def test_more_pages_than_the_device_can_use_are_refused(has_kernels: bool, open_model: OpenModel) -> None:
    """Its limit is found by doubling; up to it, a context computes."""
    model = open_model("llama", **SHAPE)
    config = {"n_threads": 1, "n_ubatch": 64, "n_window": 0}
    for n_ctx in (2**k for k in range(14, 20)):
        try:
            context = Context(model, ContextConfig(n_ctx, **config))  # type: ignore[arg-type]
        except KVError as error:
            if "cannot use as one tensor" not in str(error):
                raise
            assert chosen.name in str(error) and "use a smaller context" in str(error)
            return
        with context:
            context.decode(random_tokens(model, 40), 0, 0)
            assert np.isfinite(context.logits()).all()
    assert has_kernels, "kernels have no such limit, and other devices one that is out of reach here"


def test_the_device_is_the_one_asked_for(open_model: OpenModel, open_context: OpenContext) -> None:
    assert chosen.n_gpu_layers > 0 and all(on_device(open_context(open_model("llama"))))
