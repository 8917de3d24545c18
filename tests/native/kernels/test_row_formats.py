"""Row formats of pages: the layout to the bit, what they lose, and the page kernels that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.doctor.kernels import attend_pages, reference
from kvlocal.doctor.rows import ROWS, decode_rows, encode_rows, group_slots
from kvlocal.native.formats import PAGE_SLOTS

Floats = npt.NDArray[np.float32]

KV2 = np.array([-10, -3, 3, 10], np.float32)
KV3 = np.array([-60, -38, -21, -7, 7, 21, 38, 60], np.float32)
LEVELS = {"kv2": KV2, "kv3": KV3}
PAIRS = [("f16", "f16"), ("q8", "q8"), ("q4", "q4"), ("kv3", "kv2"), ("kv2", "kv2"), ("token2", "token2")]
KIVI = [(row, row.removesuffix("-k")) for row in ROWS if row.endswith("-k")]


def half(stored: np.ndarray) -> np.ndarray:
    return stored[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)


def codes(row: str, stored: np.ndarray) -> np.ndarray:
    """Codes ``[n, 64]`` of blocks ``[n, bytes]``, from the layout that the header describes."""
    i = np.arange(64)
    low = stored[:, 2 + i % 16] >> (i // 16 * 2) & 3
    return low | (stored[:, 18 + i % 8] >> (i // 8) & 1) << 2 if row == "kv3" else low


@pytest.mark.parametrize(
    ("row", "d", "rest"),
    [
        ("kv2", 0x314A, "a44ee45e399379e44ee49339934ae44e"),
        ("kv3", 0x2970, "49989de96276a789d89e2563769489d95aa5d22d964bb45a"),
    ],
)
def test_golden_blocks(row: str, d: int, rest: str) -> None:
    x = (((37 * np.arange(64)) % 64) - 31.5) / 16
    stored = encode_rows(row, x[None])
    assert stored[:, :2].copy().view(np.uint16)[0, 0] == d
    assert stored[0, 2:].tobytes().hex() == rest


@pytest.mark.parametrize(("row", "mse"), [("kv2", 0.1175), ("kv3", 0.0346), ("q4", 0.0074), ("q8", 2.87e-5)])
@pytest.mark.parametrize("d", [64, 128, 192])
def test_the_error_on_normal_values_is_what_the_levels_can_do(row: str, mse: float, d: int) -> None:
    x = np.random.default_rng(d).standard_normal((4000, d)).astype(np.float32)
    lost = decode_rows(row, encode_rows(row, x)) - x
    assert (lost**2).sum() / (x**2).sum() == pytest.approx(mse, rel=0.1)


@given(st.sampled_from(["kv2", "kv3"]), st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 0.01, 1.0, 300.0]))
@settings(max_examples=80, deadline=None)
def test_a_block_is_its_scale_times_the_levels_of_its_codes(row: str, seed: int, size: float) -> None:
    """Exactly, in whatever instructions it is decoded; and its norm is that of what was stored."""
    x = (size * np.random.default_rng(seed).standard_t(3, (5, 64))).astype(np.float32)
    stored = encode_rows(row, x)
    out = decode_rows(row, stored)
    np.testing.assert_array_equal(out, LEVELS[row][codes(row, stored)] * half(stored)[:, None])
    if size > 1e-3:
        np.testing.assert_allclose((out**2).sum(1), (x**2).sum(1), rtol=4e-3)
    assert (np.sign(out) == np.where(x < 0, -1, 1))[half(stored) > 0].all()


BLOCK_BYTES = {"f16": 64, "q8": 34, "q4": 18, "kv3": 26, "kv2": 18}


@pytest.mark.parametrize("row", BLOCK_BYTES)
def test_vector_code_decodes_to_the_bits_of_plain_loops(row: str) -> None:
    """Random bytes: every code at every place, scales of both signs, subnormal, infinite and not a number."""
    stored = np.random.default_rng(0).integers(0, 256, (3000, 3 * BLOCK_BYTES[row]), np.uint8)
    fast, plain = decode_rows(row, stored), decode_rows(row, stored, plain=True)
    number = ~np.isnan(plain)
    assert number.any(axis=0).all()
    np.testing.assert_array_equal(np.isnan(fast), ~number)
    np.testing.assert_array_equal(fast.view(np.uint32)[number], plain.view(np.uint32)[number])


@pytest.mark.parametrize("n", [1, 3, 7, 8, 17, 80, 127])
def test_f16_rows_of_any_length_are_rounded_and_read_as_numpy_does(n: int) -> None:
    x = (np.random.default_rng(n).standard_normal((20, n)) * 10.0 ** np.arange(-9, 11)[:, None]).astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    stored = encode_rows("f16", x)
    np.testing.assert_array_equal(stored.view(np.float16), want)
    np.testing.assert_array_equal(decode_rows("f16", stored), want.astype(np.float32))


STEPS = {"kv2": [0.9816], "kv3": [0.5006, 1.05, 1.748]}


def square_sums(x: Floats) -> Floats:
    """Of blocks ``[n, 64]``, in f64, in the one order that is allowed."""
    sums = np.zeros((len(x), 16))
    for part in np.split(x.astype(np.float64), 4, axis=1):
        sums += part**2
    while sums.shape[1] > 1:
        first, second = np.split(sums, 2, axis=1)
        sums = first + second
    return sums[:, 0].astype(np.float32)


def by_formula(row: str, x: Floats, squares: Floats) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.float16]]:
    """Codes and scales of blocks ``[n, 64]``: steps in units of the root mean square, a scale that keeps the norm."""
    rms = np.sqrt(squares / np.float32(64))[:, None]
    beyond = sum((np.abs(x) > np.float32(step) * rms).astype(int) for step in STEPS[row])
    half_levels = len(LEVELS[row]) // 2
    code = np.where(x < 0, half_levels - 1 - beyond, half_levels + beyond)
    return code, np.sqrt(squares / (LEVELS[row][code] ** 2).sum(1)).astype(np.float16)


@given(
    row=st.sampled_from(["kv2", "kv3"]),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-30, 1e-6, 0.01, 1.0, 300.0]),
    coarse=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_block_is_encoded_by_the_formula(row: str, seed: int, size: float, coarse: bool) -> None:
    """Bit for bit, in whatever instructions, blocks of zeros and of equal values too."""
    x = np.random.default_rng(seed).standard_t(3, (50, 64))
    x = (size * (np.round(x) if coarse else x)).astype(np.float32)
    code, scale = by_formula(row, x, square_sums(x))
    stored = encode_rows(row, x.reshape(5, -1)).reshape(len(x), -1)
    np.testing.assert_array_equal(codes(row, stored), code)
    np.testing.assert_array_equal(half(stored), scale.astype(np.float32))


@pytest.mark.parametrize(("row", "step"), [(row, step) for row, steps in STEPS.items() for step in steps])
def test_a_value_on_a_step_shows_that_squares_are_summed_in_f64(row: str, step: float) -> None:
    """In a sum of f32, by the order of its terms or by fused operations, the step would lie beside the value."""
    x = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    for _ in range(20):
        x[:, 5] = np.float32(step) * np.sqrt(square_sums(x) / np.float32(64))
    code, scale = by_formula(row, x, square_sums(x))
    assert (code != by_formula(row, x, (x * x).sum(1))[0]).any(axis=1).sum() > 20
    stored = encode_rows(row, x)
    np.testing.assert_array_equal(codes(row, stored), code)
    np.testing.assert_array_equal(half(stored), scale.astype(np.float32))


@pytest.mark.parametrize("row", ["q8", "q4", "kv3", "kv2", "token2"])
def test_nothing_stays_nothing(row: str) -> None:
    assert not decode_rows(row, encode_rows(row, np.zeros((1, 128)))).any()


def test_q8_and_q4_are_the_blocks_of_ggml() -> None:
    """Scale, then 32 codes; the low half of a byte is element i, the high half element i + 16."""
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    stored = encode_rows("q8", x)
    np.testing.assert_array_equal(decode_rows("q8", stored), stored[:, 2:].view(np.int8) * half(stored)[:, None])
    stored = encode_rows("q4", x)
    nibbles = np.hstack([stored[:, 2:] & 15, stored[:, 2:] >> 4]).astype(np.float32) - 8
    np.testing.assert_array_equal(decode_rows("q4", stored), nibbles * half(stored)[:, None])
    assert np.abs(decode_rows("q8", encode_rows("q8", x)) - x).max() <= np.abs(x).max() / 127


#
# kernels
#


def as_stored(x: np.ndarray, rows: list[str], mu: np.ndarray | float = 0.0) -> np.ndarray:
    """What attention sees of keys or values whose pages are stored like this."""
    out = x.astype(np.float64)
    page = 0
    while page < len(rows):
        row, step = rows[page], max(1, group_slots(rows[page]) // PAGE_SLOTS)
        if row != "f16":
            part = slice(page * PAGE_SLOTS, (page + step) * PAGE_SLOTS)
            out[part] = decode_rows(row, encode_rows(row, x[part].astype(np.float32) - mu)).astype(np.float64) + mu
        page += step
    return out


def random_pages(rng: np.random.Generator, n: int, d: int) -> list[tuple[str, str]]:
    """How the pages of ``n`` slots are stored: at most six kinds, groups of kivi whole."""
    kinds = [*PAIRS, *KIVI]
    if d % 64:
        kinds = [kind for kind in kinds if kind[0] in ("f16", "q8", "q4") or "32" in kind[0]]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))[:6]]
    out: list[tuple[str, str]] = []
    while len(out) * PAGE_SLOTS < n:
        left = n - len(out) * PAGE_SLOTS
        fits = [pair for pair in kinds if group_slots(pair[0]) <= left] or [("f16", "f16")]
        pair = fits[rng.integers(len(fits))]
        out += [pair] * max(1, group_slots(pair[0]) // PAGE_SLOTS)
    return out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pages_of_all_formats_side_by_side(data: st.DataObject) -> None:
    """Decode and prefill, any order of formats, live masks, splits, mass, keys stored without their mean."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    d, group, n_seqs = draw(st.sampled_from([64, 96, 128])), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    n_tokens, n_head_kv = draw(st.sampled_from([1, 3, 40, 200])), 2
    lengths = n_tokens + rng.integers(0, 300, n_seqs * n_head_kv)
    q = rng.standard_normal((n_seqs * n_tokens, n_head_kv * group, d)).astype(np.float32)
    offset = 3.0 * rng.standard_normal(d).astype(np.float32)
    keys = [(rng.standard_normal((n, d)) + offset).astype(np.float16) for n in lengths]
    values = [rng.standard_normal((n, d)).astype(np.float16) for n in lengths]
    kinds = rng.integers(0, 10_000)
    stored = [random_pages(np.random.default_rng(kinds), n, d) for n in lengths]
    mu = [offset] * len(keys) if draw(st.booleans()) else None
    live = [rng.random(n) > 0.3 for n in lengths]
    for mask in live:
        mask[-n_tokens:] = True
    shared: dict[str, Any] = {"n_seqs": n_seqs, "live": live, "soft_cap": draw(st.sampled_from([0.0, 20.0]))}
    centre = offset if mu else 0.0
    seen_k = [as_stored(k, [pair[0] for pair in pages], centre) for k, pages in zip(keys, stored, strict=True)]
    seen_v = [as_stored(v, [pair[1] for pair in pages]) for v, pages in zip(values, stored, strict=True)]
    want, want_mass = reference(q, seen_k, seen_v, **shared)
    for mass_too in (False, True):
        out, mass = attend_pages(
            q, keys, values, **shared, want_mass=mass_too, n_split=draw(st.integers(1, 4)), stored=stored, mu=mu,
            n_threads=draw(st.integers(1, 2)),
        )  # fmt: skip
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))
        for ours, theirs in zip(mass if mass_too else [], want_mass, strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
