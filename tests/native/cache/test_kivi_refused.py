"""What kivi pages cannot do is refused, and nothing has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contexts import OpenContext, OpenModel, random_tokens
from kivi import SHAPE, both, fill, open_kivi, read, stored

from kvlocal.errors import KVError, UsageError


def test_what_cannot_be_done_is_refused_and_changes_nothing(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_kivi(open_model, open_context)
    context.decode(random_tokens(context.model, 200), 0, 0)
    with pytest.raises(KVError, match=r"groups of 32, not 50 of them \(layer 1, KV head 1\)"):
        cache.demote(0, 1, [np.arange(64), np.arange(50)], "kivi")
    assert not any((formats != 0).any() for layer in range(2) for formats in cache.slot_formats(0, layer))
    cache.demote(0, 0, [np.arange(64), np.arange(0)], "kivi")
    with pytest.raises(KVError, match=r"^14 of 20 slots are stored in kivi .* another format \(layer 0, KV head 0\)"):
        cache.demote(0, 0, [np.arange(50, 70), np.arange(50)], "q8")
    assert [(formats != 0).sum() for formats in cache.slot_formats(0, 0)] == [64, 0]
    with pytest.raises(KVError, match="cannot be given other positions"):
        cache.roll(0)
    cache.demote(0, 0, [np.arange(0), np.arange(0)], "kivi")


def test_a_full_pool_is_an_error_and_loses_nothing(open_model: OpenModel, open_context: OpenContext) -> None:
    context, cache = open_kivi(open_model, open_context, n_ctx=256)
    context.decode(random_tokens(context.model, 100), 0, 0)
    before = read(cache, 0)
    fill(context, cache, 1, 32)
    with pytest.raises(KVError, match="pool is full: 4 pages needed, 0 free"):
        both(cache, "demote", np.arange(64), 0, "kivi")
    for at, found in read(cache, 0).items():
        for p, (k, _) in found.items():
            np.testing.assert_array_equal(k, before[at][p][0])
    context.truncate(1, 0)
    both(cache, "demote", np.arange(64), 0, "kivi")


@pytest.mark.parametrize(
    ("config", "head_dim", "what"),
    [
        ({"kivi_bits": 3}, 64, "2 or 4 bits in groups of 32 or 64, not 3 bits in groups of 32"),
        ({"kivi_group": 128}, 64, "2 or 4 bits in groups of 32 or 64, not 2 bits in groups of 128"),
        ({"formats": ("kivi",)}, 80, "Heads of 80 and 80 values cannot be stored in blocks of 32"),
        ({"formats": ("kivi",), "kivi_group": 64}, 96, "Heads of 96 and 96 values .* in blocks of 32 and 64"),
        ({"formats": ("token2",)}, 96, "Heads of 96 and 96 values cannot be stored in blocks of 64"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    config: dict[str, Any], head_dim: int, what: str, open_model: OpenModel, open_context: OpenContext
) -> None:
    with pytest.raises(UsageError, match=what):
        open_context(open_model("llama", **(SHAPE | {"head_dim": head_dim})), **config)


def test_a_head_of_96_fits_groups_of_32(open_model: OpenModel, open_context: OpenContext) -> None:
    context = open_context(open_model("llama", **(SHAPE | {"head_dim": 96})), formats=("kivi",))
    assert context.cache is not None
    context.decode(random_tokens(context.model, 64), 0, 0)
    k, v = context.cache.keys_values(0, 0, 0)
    context.cache.demote(0, 0, [np.arange(64)] * 2, "kivi")
    for now, wanted in zip(context.cache.keys_values(0, 0, 0), stored(k, v, 2, 32), strict=True):
        np.testing.assert_array_equal(now, wanted)
