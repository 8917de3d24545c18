"""Contexts that store kivi pages, and changes to all of their heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens

from kvlocal.doctor.rows import decode_rows, encode_rows
from kvlocal.errors import KVError
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context

SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "head_dim": 64}
HEADS = [(layer, head) for layer in range(2) for head in range(2)]


def open_kivi(open_model: OpenModel, open_context: OpenContext, **config: Any) -> tuple[Context, PagedCache]:
    settings = {"formats": ("kivi", "token2", "q8"), "n_seq_max": 2} | config
    context = open_context(open_model("llama", **SHAPE), **settings)
    assert context.cache is not None
    return context, context.cache


def both(cache: PagedCache, what: str, slots: Any, seq: int = 0, *args: Any) -> None:
    """``demote`` or ``keep`` the same slots in all heads of both layers."""
    for layer in range(2):
        getattr(cache, what)(seq, layer, [np.asarray(slots)] * 2, *args)


def read(cache: PagedCache, seq: int) -> dict[tuple[int, int], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Keys and values of what every head holds, by position."""
    out = {}
    for layer, head in HEADS:
        k, v = cache.keys_values(seq, layer, head)
        out[layer, head] = {int(p): (k[i], v[i]) for i, p in enumerate(cache.positions(seq, layer)[head])}
    return out


def stored(k: np.ndarray, v: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """What comes back of slots that were demoted in this order."""
    rows = f"kivi{bits}-{group}"
    return decode_rows(rows + "-k", encode_rows(rows + "-k", k)), decode_rows(rows, encode_rows(rows, v))


def fill(context: Context, cache: PagedCache, seq: int, group: int) -> None:
    """Groups that hold one slot each until the pool has no other, though the sequence itself is short."""
    with pytest.raises(KVError, match=r"pool is full: \d+ pages needed, 0 free"):
        for n in range(0, 100 * group, group):
            context.decode(random_tokens(context.model, group), n, seq)
            held = n // group
            for layer in range(2):
                cache.demote(seq, layer, [np.arange(held, held + group)] * 2, "kivi")
                cache.keep(seq, layer, [np.arange(held + 1)] * 2)
