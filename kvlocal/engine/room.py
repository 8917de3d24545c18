"""How large a context memory allows, where none was asked for."""

from __future__ import annotations

import psutil

from kvlocal.engine.config import EngineConfig, context_config
from kvlocal.errors import KVError, UsageError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.model import Model

STEP = 256
"""Contexts are chosen in multiples of so many tokens."""

_LEAST = 4096  # where memory allows none, it is for the system to swap, or to refuse
_SHARE = 0.9  # of free memory: the rest is for what else grows
_SURE = 4  # times a rough estimate: what fits then needs no look at the model
_SLOT_BYTES = 8  # position and accumulated attention of a slot


def context_tokens(model: Model, config: EngineConfig) -> tuple[int, str | None]:
    """Tokens of the context: as asked for, or for 0 what the model was trained for, if memory allows, else the largest
    that does; and a note that says so.

    A prompt that is read whole may fill the context before anything is evicted, and llama.cpp's own cache is allocated
    whole; chunks need room for the budget.
    """
    trained = model.n_ctx_train
    if config.n_ctx or model.no_alloc:
        return config.n_ctx or trained, None
    weights = int(model.llama.llama_model_size(model.handle))
    free = free_bytes(weights)
    if _SURE * rough_bytes(model, config, trained) + weights < _SHARE * free and not config.n_gpu_layers:
        return trained, None
    # of the same file without weights, llama.cpp says itself what a context would take
    probe = Model(model.path, n_gpu_layers=config.n_gpu_layers, no_alloc=True)
    try:
        if _fits(probe, config, trained, free):
            return trained, None
        low = min(least(config), trained)
        high = -(-trained // STEP)
        n = low // STEP
        while high - n > 1:
            middle = (n + high) // 2
            n, high = (middle, high) if _fits(probe, config, middle * STEP, free) else (n, middle)
    finally:
        probe.close()
    n_ctx = max(low, min(n * STEP, trained))
    return n_ctx, (
        f"Memory ({free / 2**30:.1f} GiB free) does not allow the {trained:,} tokens that the model was trained for; "
        f"the context has room for {n_ctx:,}. Choose another with -c."
    )


def least(config: EngineConfig) -> int:
    """Tokens of the smallest context that is chosen: budget and chunk fit into it."""
    budget = int(config.budget.value) if config.budget.unit == "tokens" else config.policy.min_budget
    return -(-max(_LEAST, budget + config.chunk + config.guide) // STEP) * STEP


def free_bytes(weights: int) -> int:
    """Main memory that there is for weights and cache together, of a model whose weights are loaded already.

    Weights that were mapped from their file count as available to the system, which may drop them; those that were
    copied do not.
    """
    info = psutil.Process().memory_info()
    copied = max(int(info.rss) - int(getattr(info, "shared", info.rss)), 0)
    return int(psutil.virtual_memory().available) + min(copied, weights)


def rough_bytes(model: Model, config: EngineConfig, n_ctx: int) -> int:
    """K and V in f16 of ``n_ctx`` tokens per sequence, by what the file says of all layers alike."""
    arch = model.meta("general.architecture")
    heads = max(int(model.llama.llama_model_n_head(model.handle)), 1)
    d = int(model.meta(f"{arch}.attention.key_length") or 0) or model.llama.llama_model_n_embd(model.handle) // heads
    n_kv = max(int(model.llama.llama_model_n_head_kv(model.handle)), 1)
    return int(model.llama.llama_model_n_layer(model.handle)) * n_kv * 4 * d * n_ctx * config.n_seq_max


def _fits(probe: Model, config: EngineConfig, n_ctx: int, free: int) -> bool:
    """Whether weights, cache and buffers have room, in main memory and on accelerators."""
    try:
        context = Context(probe, context_config(probe, config, n_ctx))
    except UsageError:
        raise
    except KVError:
        return False
    with context:
        main, device = context.breakdown(), context.breakdown(on_device=True)
        cache = int(main.context_bytes)
        if context.cache is not None:
            # what lies on an accelerator is allocated whole
            stats = context.stats()
            on_device = min(device.context_bytes / (stats.reserved_bytes + stats.query_bytes), 1)
            cache = round((cache_bytes(config, context.cache, n_ctx) + stats.query_bytes) * (1 - on_device))
    if device.model_bytes + device.context_bytes and device.context_bytes + device.compute_bytes > device.free_bytes:
        return False
    return int(main.model_bytes + main.compute_bytes) + cache <= _SHARE * free


def cache_bytes(config: EngineConfig, cache: PagedCache, n_ctx: int) -> int:
    """Most bytes that all sequences of our cache take at once, if one after the other reads a prompt as long as the
    context."""
    f16 = cache.bytes_per_token + _SLOT_BYTES * sum(layer.n_head_kv for layer in cache.layers)
    stored = config.storage.bytes_per_token(cache) if config.storage.demotes else f16
    evicts = config.policy.evicts and not config.budget.keeps_all
    kept = float(n_ctx)
    if evicts:
        value = float(config.budget.value)
        kept = {"tokens": value, "percent": n_ctx * value / 100, "bytes": value / stored}[config.budget.unit]
    recent = config.evict_every + config.storage.sink + config.storage.tail
    between = min(kept, n_ctx) * stored + min(recent, n_ctx) * f16
    if evicts and config.prefill == "chunked":
        reading = between + (config.chunk + config.guide) * f16
    else:
        # while a layer is demoted it is there twice
        reading = n_ctx * (f16 + (stored / len(cache.layers) if config.storage.demotes else 0))
    return int(reading + (config.n_seq_max - 1) * between)
