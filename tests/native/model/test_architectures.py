"""Every architecture of the pinned llama.cpp: the paged cache agrees with llama.cpp's own, or refuses it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from anymodel import N_VOCAB, AnyModel, make
from arch_table import GROUPS, TABLE, Arch, names_in_llama_cpp

from kvlocal.errors import KVError, UsageError
from kvlocal.native.context import Context, ContextConfig

N_TEXT, N_MORE = 110, 12  # past three windows of 32 tokens
CONFIG = ContextConfig(512, n_threads=1, n_outputs=256, n_seq_max=2)
PATHS = {
    "a token at a time": replace(CONFIG, n_ubatch=1),
    "batches within the window": replace(CONFIG, n_ubatch=32),
    "batches longer than it": replace(CONFIG, n_ubatch=100),
    "stock operators": replace(CONFIG, n_ubatch=100, portable=True),
}
MADE = [arch for arch in TABLE if arch.made]
SERVED = [arch for arch in MADE if arch.served]
TOKENS = np.random.default_rng(1).integers(0, N_VOCAB, 600)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyModel]:
    made = make(request.param, tmp_path_factory.mktemp("any") / f"{request.param.id}.gguf")
    yield made
    made.close()


def of(archs: list[Arch]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", archs, ids=[arch.id for arch in archs], indirect=True)


def arch_of(request: pytest.FixtureRequest) -> Arch:
    arch = request.node.callspec.params["model"]
    assert isinstance(arch, Arch)
    return arch


def logits_of(model: AnyModel, config: ContextConfig) -> np.ndarray:
    """Of two texts, read one after the other, and of tokens that continue both at once."""
    out = []
    with Context(model, config) as context:
        for seq in (0, 1):
            context.decode(TOKENS[seq : seq + N_TEXT], 0, seq, outputs="all")
            out.append(context.logits(N_TEXT))
        for i in range(N_MORE):
            pos, seqs = np.full(2, N_TEXT + i), np.arange(2)
            context.decode(TOKENS[300 + i : 302 + i], pos, seqs)
            out.append(context.logits(2))
    return np.concatenate(out).astype(np.float64)


def error(x: np.ndarray, want: np.ndarray) -> float:
    """Squared, as a share of the square of what is wanted."""
    return float(((x - want) ** 2).sum() / (want**2).sum())


def test_every_architecture_is_in_the_table() -> None:
    assert {arch.name for arch in TABLE} == set(names_in_llama_cpp())
    assert {arch.group for arch in TABLE} <= set(GROUPS)
    assert len({arch.id for arch in TABLE}) == len(TABLE)


@of(SERVED)
def test_the_paged_cache_agrees_with_the_stock_one(model: AnyModel, request: pytest.FixtureRequest) -> None:
    # in f32, and without flash attention: the paged cache then differs by its rows in f16 alone
    want = logits_of(model, replace(CONFIG, paged=False, type_kv="f32", flash_attn=False))
    errors = {name: error(logits_of(model, config), want) for name, config in PATHS.items()}
    assert max(errors.values()) < arch_of(request).bound, errors


@of(SERVED)
@pytest.mark.parametrize("portable", [False, True], ids=["kernels", "stock operators"])
def test_a_mark_leads_back(model: AnyModel, portable: bool, request: pytest.FixtureRequest) -> None:
    """What is read after going back equals what is read where nothing else has been; saved and branched as well."""
    config = replace(CONFIG, n_ubatch=64, portable=portable, n_seq_max=3)
    text, other, end = TOKENS[:100], TOKENS[200:260], TOKENS[400:430]
    with Context(model, config) as context:
        context.decode(text, 0, 0, outputs="none")
        context.decode(end, 100, 0, outputs="all")
        want = context.logits(len(end))
    with Context(model, config) as context:
        cache = context.cache
        assert cache is not None
        context.decode(text, 0, 0, outputs="none")
        saved = context.save(0)
        context.mark(0)
        context.branch(0, 1)
        context.decode(other, 100, 0, outputs="none")
        assert context.reach(0, 130) in (100, 130) and context.reach(0, 160) == 160
        if context.reach(0, 50) != 50:
            assert not context.truncate(0, 50) and context.n_seen(0) == 160
        assert context.truncate(0, 100)
        context.restore(2, saved)
        for seq in range(3):
            context.decode(end, 100, seq, outputs="all")
            assert error(context.logits(len(end)), want) < 1e-10, seq
        for seq in range(3):
            context.truncate(seq, 0)
        assert context.stats().used_bytes == context.stats().fixed_bytes == 0


@of(SERVED)
def test_open_layers_are_evicted_and_the_others_are_not(model: AnyModel, request: pytest.FixtureRequest) -> None:
    with Context(model, replace(CONFIG, n_window=16)) as context:
        cache = context.cache
        assert cache is not None and len(cache.layers) > 0
        context.decode(TOKENS[:N_TEXT], 0, 0)
        before = cache.seq_stats(0)
        for layer, info in enumerate(cache.layers):
            scores = cache.window_scores(0, layer)
            assert scores.shape == (info.n_head, N_TEXT) and (scores.sum(axis=1) <= 1.001).all()
            cache.keep(0, layer, [np.arange(0, N_TEXT, 2)] * info.n_head_kv)
        after = cache.seq_stats(0)
        assert after.n_slots * 2 == before.n_slots and after.fixed_bytes == before.fixed_bytes
        assert after.fixed_bytes <= cache.fixed_bytes
        assert after.used_bytes - after.fixed_bytes == (before.used_bytes - before.fixed_bytes) / 2
        context.decode(TOKENS[200:240], N_TEXT, 0)
        assert np.isfinite(context.logits()).all()


@of([arch for arch in MADE if not arch.served])
def test_what_is_not_served_is_refused_by_name(model: AnyModel, request: pytest.FixtureRequest) -> None:
    name = arch_of(request).name
    with pytest.raises(UsageError, match=f"'{name}'.*--policy full"), Context(model, CONFIG):
        pass
    with Context(model, replace(CONFIG, paged=False)) as context:
        context.decode(TOKENS[:20], 0, 0)
        assert np.isfinite(context.logits()).all()
        with pytest.raises(KVError, match="no paged memory"):
            model.native.check(model.native.lib.kvl_mark(context.handle, 0))
