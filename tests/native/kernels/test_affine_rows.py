"""The rows of kivi and token2: what is stored, to the bit, against their papers' formulas written in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlocal.doctor.rows import decode_rows, encode_rows

EXAMPLE = np.array([0.1, -0.4, 0.9, 0.3, -1, 0.6, 0, 2], np.float32)
EXAMPLE_CODES = [1, 1, 2, 1, 0, 2, 1, 3]
KINDS = [(bits, group) for bits in (2, 4) for group in (32, 64)]


def unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., 8 * bytes / bits]`` of whole runs of 32: element i in byte i % 4b, at bit b * (i / 4b)."""
    runs = stored.reshape(*stored.shape[:-1], -1, 4 * bits)
    i = np.arange(32)
    codes = runs[..., i % (4 * bits)] >> (bits * (i // (4 * bits))) & (2**bits - 1)
    return codes.reshape(*stored.shape[:-1], -1)


def halves(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def kivi(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, zero and codes of groups along the last axis, f32 step by step."""
    top = np.float32(2**bits - 1)
    zero = f16(x.min(-1, keepdims=True))
    scale = f16((x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / top)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale > 0, (x - zero) / scale, np.float32(0))
    return scale[..., 0], zero[..., 0], np.rint(np.clip(steps, 0, top)).astype(np.uint8)


def samples(seed: int, n: int, size: float) -> np.ndarray:
    """Rows ``[n, 128]`` with heavy tails, channels far off or far larger, some constant; f16 can hold all."""
    rng = np.random.default_rng(seed)
    x = size * rng.standard_t(3, (n, 128))
    x[:, rng.integers(0, 128, 6)] += 60 * size * rng.standard_normal(6)
    x[:, rng.integers(0, 128, 3)] *= 40
    x[:, 5] = x[0, 5]
    x[n // 2] = x[n // 2, 0]
    return np.clip(x, -65504, 65504).astype(np.float32)


def test_the_worked_example_of_a_group() -> None:
    """quant.md 2.1: scale 1, these codes, along a channel and along a slot."""
    x = np.concatenate([EXAMPLE, np.full(24, 0.3, np.float32)])
    for row, rows in (("kivi2-32", x[None]), ("kivi2-32-k", np.repeat(x[:, None], 32, axis=1))):
        out = decode_rows(row, encode_rows(row, rows))
        first = out[0] if row == "kivi2-32" else out[:, 7]
        np.testing.assert_array_equal(first[:8], np.array(EXAMPLE_CODES, np.float32) - 1)
        np.testing.assert_array_equal(first[8:], 0)


def test_codes_are_packed_in_runs_of_32() -> None:
    x = np.tile(np.arange(16, dtype=np.float32), 2)
    stored = encode_rows("kivi4-32", x[None])[0]
    assert stored[4:].tolist() == [17 * i for i in range(16)], "element i and i + 16 share a byte"
    x = (np.arange(32) // 8).astype(np.float32)
    stored = encode_rows("kivi2-32", x[None])[0]
    assert stored[4:].tolist() == [0b11100100] * 8, "elements i, i + 8, i + 16, i + 24 share a byte"


@pytest.mark.parametrize(("bits", "group"), KINDS)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-5, 0.01, 1.0, 300.0]))
@settings(max_examples=25, deadline=None)
def test_values_are_stored_slot_by_slot(bits: int, group: int, seed: int, size: float) -> None:
    x = samples(seed, 5, size)
    scale, zero, codes = kivi(x.reshape(5, -1, group), bits)
    stored = encode_rows(f"kivi{bits}-{group}", x)
    assert stored.nbytes * 8 == (bits + 32 / group) * x.size
    blocks = stored.reshape(5, 128 // group, -1)
    np.testing.assert_array_equal(halves(blocks[..., :2])[..., 0], scale)
    np.testing.assert_array_equal(halves(blocks[..., 2:4])[..., 0], zero)
    np.testing.assert_array_equal(unpack(blocks[..., 4:], bits), codes)
    wanted = codes * scale[..., None] + zero[..., None]
    np.testing.assert_array_equal(decode_rows(f"kivi{bits}-{group}", stored), wanted.reshape(x.shape))


@pytest.mark.parametrize(("bits", "group"), KINDS)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-5, 0.01, 1.0, 300.0]))
@settings(max_examples=25, deadline=None)
def test_keys_are_stored_channel_by_channel(bits: int, group: int, seed: int, size: float) -> None:
    """Two groups one after the other: scales and zeros of all channels, then the codes slot by slot."""
    x = samples(seed, 2 * group, size)
    scale, zero, codes = kivi(x.reshape(2, group, 128).transpose(0, 2, 1), bits)
    stored = encode_rows(f"kivi{bits}-{group}-k", x)
    assert stored.nbytes * 8 == (bits + 32 / group) * x.size
    groups = stored.reshape(2, -1)
    np.testing.assert_array_equal(halves(groups[:, :256]), scale)
    np.testing.assert_array_equal(halves(groups[:, 256:512]), zero)
    rows = groups[:, 512:].reshape(2, group, -1)
    np.testing.assert_array_equal(unpack(rows, bits).transpose(0, 2, 1), codes)
    wanted = (codes * scale[..., None] + zero[..., None]).transpose(0, 2, 1).reshape(x.shape)
    np.testing.assert_array_equal(decode_rows(f"kivi{bits}-{group}-k", stored), wanted)


AFFINE = [*(f"kivi{bits}-{group}{keys}" for bits, group in KINDS for keys in ("", "-k")), "token2"]


@pytest.mark.parametrize("row", AFFINE)
def test_the_plain_decoder_gives_the_bits_of_the_kernels(row: str) -> None:
    stored = encode_rows(row, samples(3, 128, 1.0))
    fast, plain = decode_rows(row, stored), decode_rows(row, stored, plain=True)
    assert plain.shape == (128, 128) and np.ptp(plain) > 1
    np.testing.assert_array_equal(fast, plain)


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_an_outlier_costs_its_own_channel_only(bits: int, group: int) -> None:
    """Keys that are stored per slot lose all channels to one that is large; that is what kivi is for."""
    x = np.random.default_rng(0).standard_normal((group, 64)).astype(np.float32)
    plain = decode_rows(f"kivi{bits}-{group}-k", encode_rows(f"kivi{bits}-{group}-k", x))
    x[:, 9] = 200 + 5 * x[:, 9]
    out = decode_rows(f"kivi{bits}-{group}-k", encode_rows(f"kivi{bits}-{group}-k", x))
    others = np.arange(64) != 9
    np.testing.assert_array_equal(out[:, others], plain[:, others])
    step = np.ptp(x[:, 9]) / (2**bits - 1)
    assert np.abs(out[:, 9] - x[:, 9]).max() <= 0.51 * step + 0.1  # f16 has steps of 1/8 there
    per_slot = decode_rows(f"kivi{bits}-{group}", encode_rows(f"kivi{bits}-{group}", np.hstack([x, x])))[:, :64]
    lost = [np.linalg.norm((y - x)[:, others]) for y in (out, per_slot)]
    assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("row", ["kivi2-32", "kivi4-64", "kivi2-64-k", "kivi4-32-k", "token2"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.1, 3e-8, -65504.0])
def test_a_constant_group_comes_back_as_f16(row: str, value: float) -> None:
    x = np.full((64, 64), value, np.float32)
    np.testing.assert_array_equal(decode_rows(row, encode_rows(row, x)), f16(x))


def test_one_slot_that_is_no_number_leaves_other_channels_alone() -> None:
    x = np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32)
    wanted = decode_rows("kivi2-32-k", encode_rows("kivi2-32-k", x))
    x[3, 4] = np.nan
    out = decode_rows("kivi2-32-k", encode_rows("kivi2-32-k", x))
    others = np.arange(64) != 4
    np.testing.assert_array_equal(out[:, others], wanted[:, others])


def token2(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, zero point and codes of blocks that are not constant; the zero point is clamped where quanto's wraps."""
    scale = f16((x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / np.float32(3))
    zero = np.clip(np.rint(-x.min(-1, keepdims=True) / scale), -128, 127)
    codes = np.clip(np.rint(x / scale) + zero, 0, 3).astype(np.uint8)
    return scale[..., 0], zero[..., 0].astype(np.int8), codes


def test_the_worked_examples_of_token2() -> None:
    """quant.md 1.3: as kivi where zero is near a step, half a step off where it is not, lost where it is far away."""
    for x, wanted in (
        (EXAMPLE, [0, 0, 1, 0, -1, 1, 0, 2]),
        (np.array([0.5, 1.2, 2.0, 3.5]), [0, 1, 2, 3]),
        (np.array([90, 90.3, 90.9, 91]), [131 * float(f16(np.array(1 / 3)))] * 4),
    ):
        out = decode_rows("token2", encode_rows("token2", np.resize(x, 64)[None]))[0]
        np.testing.assert_array_equal(out, np.resize(np.array(wanted, np.float32), 64))


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-5, 0.01, 1.0, 300.0]), offset=st.floats(-200, 200))
@settings(max_examples=60, deadline=None)
def test_token2_blocks(seed: int, size: float, offset: float) -> None:
    x = (size * (np.random.default_rng(seed).standard_t(3, (5, 128)) + offset)).astype(np.float32)
    scale, zero, codes = token2(x.reshape(5, 2, 64))
    stored = encode_rows("token2", x)
    assert stored.shape == (5, 38), "19 bytes per 64 values: 2.375 bits"
    blocks = stored.reshape(5, 2, 19)
    np.testing.assert_array_equal(halves(blocks[..., :2])[..., 0], scale)
    np.testing.assert_array_equal(blocks[..., 2].view(np.int8), zero)
    np.testing.assert_array_equal(unpack(blocks[..., 3:], 2), codes)
    wanted = scale[..., None] * (codes.astype(np.float32) - zero[..., None])
    np.testing.assert_array_equal(decode_rows("token2", stored), wanted.reshape(x.shape))
