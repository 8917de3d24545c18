"""Rows of keys and values as they are stored in pages: written and read by the library, and by plain code beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.doctor.operators import libraries
from kvlocal.native.fork import check_process

Floats = npt.NDArray[np.float32]

_KIVI = {f"kivi{b}-{group}{keys}": (b, group) for keys in ("", "-k") for b in (2, 4) for group in (32, 64)}
ROWS = ("f16", "q8", "q4", "kv3", "kv2", "token2", *_KIVI)
"""How a row can be stored, in the order of ``kvl_row``; ``kivi2-64-k``: 2-bit keys in groups of 64 slots."""

_BLOCKS = {  # values, bytes
    **{"f16": (1, 2), "q8": (32, 34), "q4": (32, 18), "kv3": (64, 26), "kv2": (64, 18), "token2": (64, 19)},
    **{row: (group, 4 + group * b // 8) for row, (b, group) in _KIVI.items()},
}


def group_slots(row: str) -> int:
    """Slots that are stored together: 1 unless they share scales."""
    return _KIVI[row][1] if row.endswith("-k") else 1


def encode_rows(row: str, x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """``x`` ``[n, d]`` as it is stored, ``[n, bytes of a row]``.

    ``d`` is a multiple of the block's values, ``n`` of :func:`group_slots`: the bytes of a group are rows by their
    number only. Groups of keys need ``d`` to be a multiple of 32.
    """
    check_process()
    values, size = _BLOCKS[row]
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((len(x), x.shape[1] * size // values), np.uint8)
    libraries()[1].kvl_rows_encode(ROWS.index(row), x.ctypes.data, *x.shape, out.ctypes.data)
    return out


def decode_rows(row: str, stored: npt.NDArray[np.uint8], *, plain: bool = False) -> Floats:
    """What :func:`encode_rows` stored, float32 ``[n, d]``; ``plain``: by code that the vector code must equal.

    That is C in plain loops, and numpy for the formats that have none (kivi, token2).
    """
    check_process()
    values, size = _BLOCKS[row]
    stored = np.ascontiguousarray(stored)
    out = np.empty((len(stored), stored.shape[1] * values // size), np.float32)
    d, library = out.shape[1], libraries()[1]
    if plain and (row in _KIVI or row == "token2"):
        return _decode_affine(row, stored, d)
    # rows that share nothing are read at once, but for the loops, which read one
    step = 1 if plain else max(len(out), 1) if group_slots(row) == 1 else group_slots(row)
    for i in range(0, len(out), step):
        source, target = stored[i : i + step], out[i : i + step]
        if plain:
            library.kvl_row_decode_ref(ROWS.index(row), source.ctypes.data, d, target.ctypes.data)
        else:
            library.kvl_rows_decode(ROWS.index(row), source.ctypes.data, 0, step, d, target.ctypes.data, d)
    return out


def _decode_affine(row: str, stored: npt.NDArray[np.uint8], d: int) -> Floats:
    """code * scale + zero, from the layouts that kvl-format.h describes; the products are exact in f32."""

    def halves(part: npt.NDArray[np.uint8]) -> Floats:
        return np.ascontiguousarray(part).view(np.float16).astype(np.float32)

    bits, group = _KIVI.get(row, (2, 64))
    i, run = np.arange(32), 4 * bits  # 32 codes are packed together

    def codes(part: npt.NDArray[np.uint8]) -> Floats:
        runs = part.reshape(*part.shape[:-1], -1, run)
        out = runs[..., i % run] >> (bits * (i // run)) & (2**bits - 1)
        return out.reshape(*part.shape[:-1], -1).astype(np.float32)

    if row.endswith("-k"):
        groups = stored.reshape(len(stored) // group, -1)
        scale, zero = halves(groups[:, : 2 * d]), halves(groups[:, 2 * d : 4 * d])
        out = codes(groups[:, 4 * d :].reshape(len(groups), group, -1)) * scale[:, None] + zero[:, None]
    else:
        blocks = stored.reshape(len(stored), -1, _BLOCKS[row][1])
        scale = halves(blocks[..., :2])
        is_int = row == "token2"
        zero = -scale * blocks[..., 2:3].view(np.int8) if is_int else halves(blocks[..., 2:4])
        out = codes(blocks[..., 3 if is_int else 4 :]) * scale + zero
    return out.reshape(len(stored), d)
