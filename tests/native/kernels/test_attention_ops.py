"""The page kernels by themselves, over a grid of shapes, against attention in f64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.doctor.kernels import attend_pages, attend_stock, reference

GRID = [
    (d, group, n_tokens)
    for d, group, n_tokens in itertools.product(
        (64, 72, 80, 96, 128, 256), (1, 2, 3, 4, 7, 8, 16), (1, 2, 9, 25, 130, 600)
    )
    # every head size with every group at one length, every length with every group at one size
    if n_tokens in (1, 9) or d == 64 or (d, group) in {(256, 8), (80, 3)}
]


def case(
    d_k: int,
    d_v: int,
    group: int,
    n_tokens: int,
    *,
    n_seqs: int = 1,
    n_head_kv: int = 2,
    most: int = 300,
    seed: int = 0,
) -> tuple[Any, list[Any], list[Any]]:
    """Random queries, keys and values; every stream holds another number of slots."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_seqs * n_tokens, n_head_kv * group, d_k)).astype(np.float32)
    lengths = n_tokens + rng.integers(0, most, n_seqs * n_head_kv)
    keys = [rng.standard_normal((n, d_k)).astype(np.float16) for n in lengths]
    values = [rng.standard_normal((n, d_v)).astype(np.float16) for n in lengths]
    return q, keys, values


def check(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    (out, mass), (ref, ref_mass) = got, want
    np.testing.assert_allclose(out, ref, rtol=0, atol=tolerance * max(1.0, float(np.abs(ref).max())))
    for ours, theirs in zip(mass, ref_mass, strict=True):
        if ours.any():
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("d", "group", "n_tokens"), GRID)
def test_output_and_mass_over_the_grid(d: int, group: int, n_tokens: int) -> None:
    """Ragged heads, pages in any order, unwritten slots full of NaN."""
    q, k, v = case(d, d, group, n_tokens)
    want = reference(q, k, v)
    check(attend_pages(q, k, v), want)
    out, mass = attend_pages(q, k, v, want_mass=True, n_split=3)
    check((out, mass), want)
    for m in mass:
        np.testing.assert_allclose(m.sum(1), n_tokens, rtol=1e-4)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_mask_and_split(data: st.DataObject) -> None:
    """Several sequences, soft-capped logits, live masks that blank whole pages, keys and values of unequal size."""
    draw = data.draw
    seed, n_seqs, n_tokens = draw(st.integers(0, 1000)), draw(st.integers(1, 3)), draw(st.integers(1, 60))
    d_k, d_v = draw(st.sampled_from([8, 40, 64, 96])), draw(st.sampled_from([16, 64, 72]))
    q, k, v = case(d_k, d_v, draw(st.integers(1, 5)), n_tokens, n_seqs=n_seqs, seed=seed)
    dead = draw(st.sampled_from([0.0, 0.3, 0.97]))
    rng = np.random.default_rng(seed)
    live = [rng.random(len(x)) >= dead for x in k]
    for mask in live:
        mask[-n_tokens:] = True  # a new token always sees itself
    shared: dict[str, Any] = {"n_seqs": n_seqs, "live": live, "soft_cap": draw(st.sampled_from([0.0, 0.5, 30.0]))}
    want = reference(q, k, v, **shared)
    for want_mass in (False, True):
        n_split, n_threads = draw(st.integers(1, 6)), draw(st.integers(1, 3))
        got = attend_pages(q, k, v, **shared, want_mass=want_mass, n_split=n_split, n_threads=n_threads, seed=seed)
        check(got, want)


def test_the_result_does_not_depend_on_threads() -> None:
    for n_tokens in (1, 100):
        q, k, v = case(64, 64, 3, n_tokens, most=2000)
        one, mass_one = attend_pages(q, k, v, want_mass=True, n_split=7, n_threads=1)
        for n_threads in (2, 3):
            out, mass = attend_pages(q, k, v, want_mass=True, n_split=7, n_threads=n_threads)
            assert np.array_equal(out, one)
            assert all(np.array_equal(a, b) for a, b in zip(mass, mass_one, strict=True))


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_flat_attention_over_a_long_context_stays_accurate(n_tokens: int) -> None:
    """32k slots of nearly equal weight: sums in f32 stay within 1e-4 of f64, and below llama.cpp's own error."""
    rng = np.random.default_rng(1)
    q = 0.05 * rng.standard_normal((n_tokens, 2, 64)).astype(np.float32)
    k = rng.standard_normal((1, 32768, 64)).astype(np.float16)
    v = (1.0 + rng.standard_normal((1, 32768, 64))).astype(np.float16)
    want, _ = reference(q, list(k), list(v))
    ours, _ = attend_pages(q, list(k), list(v), n_split=16)
    stock = attend_stock(q, k, v)

    def error(got: Any) -> float:
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    assert error(ours) <= 1e-4
    assert error(ours) <= error(stock)
