"""One attention operator by itself, without a model: the page kernels and llama.cpp's, for checks and measurements."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.doctor.operators import PREC_F32, Graph
from kvlocal.doctor.rows import ROWS, Floats, encode_rows, group_slots
from kvlocal.native.formats import PAGE_SLOTS

FEW_ROWS = 24
"""Rows (tokens x query heads of a group) up to which a stream's pages are split among threads, as in kvl-attn.h."""


class AttnParams(ctypes.Structure):
    """Launch scalars of the operators, ``kvl_attn_params``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("table", "n_pools", "n_seqs", "n_head_kv", "n_split", "n_kv")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("d_v", ctypes.c_int32),
        ("flags", ctypes.c_int32),
    )


class MoveParams(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("k_row", "v_row", "d_k", "d_v"))


_MASS_SUM = 1
_POOL_SHIFT, POOL_ALIGNMENT = 27, 4096
POOL = np.dtype([("rows", np.int32), ("base", np.uint32)])
STREAM = np.dtype([*((n, np.int32) for n in ("n_slots", "first", "n_pages", "mean", "number", "window")), ("", "2i4")])
PAGE = np.dtype([("entry", np.uint32), ("live", np.uint32), ("slot", np.int32), ("mass", np.int32)])


def _aligned(pool: npt.NDArray[np.uint8]) -> int:
    return -(-pool.size // POOL_ALIGNMENT) * POOL_ALIGNMENT


class Pages:
    """Pages of one shape of heads in one array, a pool per pair of row formats, and what the table says of them."""

    def __init__(self, n_pages: int, d_k: int, d_v: int) -> None:
        self.n_pages, self.d = n_pages, (d_k, d_v)
        self.kinds: list[tuple[str, str]] = []
        self._pools: list[npt.NDArray[np.uint8]] = []  # [units, bytes of a unit]
        self.pool(("f16", "f16"))

    def pool(self, kinds: tuple[str, str]) -> int:
        """Number of the pool of pages that are stored like this."""
        if kinds not in self.kinds:
            together = self.together(kinds)
            size = sum(encode_rows(row, np.zeros((64, d))).shape[1] for row, d in zip(kinds, self.d, strict=True))
            # bytes of 255 are NaN wherever they are a scale
            pool = np.full((-(-self.n_pages // together), together * PAGE_SLOTS * size), 255, np.uint8)
            self.kinds.append(kinds)
            self._pools.append(pool)
        return self.kinds.index(kinds)

    @staticmethod
    def together(kinds: tuple[str, str]) -> int:
        """Pages of a unit."""
        return max(1, group_slots(kinds[0]) // PAGE_SLOTS)

    def store(self, kinds: tuple[str, str], page: int, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> list[int]:
        """Writes a unit, or the first rows of a page, from ``page`` on; the entries of its pages."""
        number, together = self.pool(kinds), self.together(kinds)
        unit = self._pools[number][page // together]
        k_rows, v_rows = encode_rows(kinds[0], k), encode_rows(kinds[1], v)
        at = together * PAGE_SLOTS * k_rows.shape[1]
        unit[: k_rows.size] = k_rows.ravel()
        unit[at : at + v_rows.size] = v_rows.ravel()
        return [number << _POOL_SHIFT | (page + i) for i in range(together)]

    def data(self) -> npt.NDArray[np.int8]:
        out = np.full(sum(map(_aligned, self._pools)), 255, np.uint8)
        for base, pool in zip(self.bases(), self._pools, strict=True):
            out[base : base + pool.size] = pool.ravel()
        return out.view(np.int8)

    def bases(self) -> list[int]:
        """Where the pools begin, bytes."""
        return np.cumsum([0, *map(_aligned, self._pools[:-1])]).tolist()

    def refs(self) -> npt.NDArray[Any]:
        """The pools as the table names them."""
        out = np.zeros(-(-len(self.kinds) // 2) * 2, POOL)  # what follows begins at 16 bytes
        n = len(self.kinds)
        out["rows"][:n] = [ROWS.index(k) | ROWS.index(v) << 8 for k, v in self.kinds]
        out["base"][:n] = [base // POOL_ALIGNMENT for base in self.bases()]
        return out


def attend_pages(
    q: Floats,
    keys: Sequence[npt.NDArray[np.float16]],
    values: Sequence[npt.NDArray[np.float16]],
    *,
    n_seqs: int = 1,
    soft_cap: float = 0.0,
    live: Sequence[npt.NDArray[np.bool_]] | None = None,
    want_mass: bool = False,
    n_split: int = 1,
    n_threads: int = 1,
    seed: int = 0,
    stored: Sequence[Sequence[tuple[str, str]]] | None = None,
    mu: Sequence[Floats] | None = None,
) -> tuple[Floats, list[Floats]]:
    """The page kernels over K and V that are scattered over the pages of a pool.

    Args:
        q: ``[n_seqs * n_tokens, n_head, d_k]``; the newest tokens of each sequence, in order.
        keys: per stream (sequence, KV head) f16 ``[n_slots, d_k]``; the last ``n_tokens`` slots are the new tokens'.
        values: as keys, ``[n_slots, d_v]``.
        n_seqs: sequences.
        soft_cap: logits become ``soft_cap * tanh(logit / soft_cap)``; 0: none.
        live: per stream bool ``[n_slots]``: what can be seen; each token must see a slot.
        want_mass: also sum up what every slot receives.
        n_split: parts into which a stream's pages are cut, for few rows.
        n_threads: threads.
        seed: order of the pages in the pool.
        stored: per stream and page how its keys and values are stored (:data:`ROWS`); ``None``: f16. Pages of kivi are
            full, those of groups of 64 slots come in pairs.
        mu: per stream ``[d_k]``, taken from the keys of all pages but f16 ones before they are stored.

    Returns:
        The output ``[n_seqs * n_tokens, n_head, d_v]``, and the mass per stream ``[group, n_slots]`` (zeros unless
        asked for). Logits are scaled by ``d_k ** -0.5``.
    """
    n_head, d_k = q.shape[1:]
    d_v = values[0].shape[1]
    n_stream, n_tokens = len(keys), len(q) // n_seqs
    group = n_head // (n_stream // n_seqs)
    rows = n_tokens * group
    pages, streams, listed = _table(keys, values, live, stored, mu, seed)
    table = np.concatenate([part.view(np.int32).ravel() for part in (pages.refs(), streams, listed)])
    means = np.zeros((1, d_k)) if mu is None else np.stack(list(mu))
    few = rows <= FEW_ROWS
    n_kv = int(streams["n_pages"].max()) * PAGE_SLOTS
    params = AttnParams(
        0, len(pages.kinds), n_seqs, n_stream // n_seqs, n_split if few else 1, n_kv, d_k**-0.5, soft_cap, d_v,
        _MASS_SUM if want_mass else 0,
    )  # fmt: skip
    parts = rows * n_stream * ((d_v + 2) * params.n_split + (n_kv if want_mass else 0))
    data, mass = pages.data(), np.zeros((pages.n_pages, group * PAGE_SLOTS), np.float32)
    size = data.nbytes + mass.nbytes + 2 * q.nbytes + 4 * (parts + rows * n_stream * (2 * d_v + 2))
    graph = Graph(size + 4 * (table.size + means.size))
    try:
        args = [graph.tensor(a) for a in (np.asarray(q, np.float32), table, data, means.astype(np.float32))]
        summed = graph.tensor(mass)
        wanted = []
        if few and (params.n_split > 1 or want_mass):
            part = graph.custom("kvl_attn_compute", args, params, parts)
            out = graph.custom("kvl_attn_merge", [part], params, d_v, n_head, n_tokens * n_seqs)
        elif want_mass:
            part = out = graph.custom("kvl_attn_compute", args, params, (d_v + 2) * rows * n_stream)
        else:
            out = graph.custom("kvl_attn_compute", args, params, d_v, n_head, n_tokens * n_seqs)
        if want_mass:
            wanted.append(graph.change("kvl_attn_mass", summed, [part, *args], params))
        graph.run(n_threads, out, *wanted)
        mass = graph.read(summed, *mass.shape)
        return graph.read(out, n_tokens * n_seqs, n_head, d_v), _by_stream(mass, streams, listed, group)
    finally:
        graph.close()


def _table(
    keys: Sequence[npt.NDArray[Any]],
    values: Sequence[npt.NDArray[Any]],
    live: Sequence[npt.NDArray[np.bool_]] | None,
    stored: Sequence[Sequence[tuple[str, str]]] | None,
    mu: Sequence[Floats] | None,
    seed: int,
) -> tuple[Pages, npt.NDArray[Any], npt.NDArray[Any]]:
    """Pages in random order, and the streams and the pages of the table; a page that nobody sees is not listed."""
    n_pages = [-(-len(k) // PAGE_SLOTS) for k in keys]
    order = np.random.default_rng(seed).permutation(sum(n_pages))
    pages = Pages(sum(n_pages), keys[0].shape[1], values[0].shape[1])
    streams = np.zeros(len(keys), STREAM)
    listed: list[tuple[int, int, int, int]] = []
    n_pairs = done = 0
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        kinds = stored[i] if stored else [("f16", "f16")] * n_pages[i]
        seen = np.ones(len(k), bool) if live is None else live[i]
        bits = np.zeros(n_pages[i] * PAGE_SLOTS, bool)
        bits[: len(k)] = seen
        masks = np.packbits(bits.reshape(-1, PAGE_SLOTS), axis=1, bitorder="little").view(np.uint32)[:, 0]
        entries: list[int] = []
        while len(entries) < n_pages[i]:
            page, pair = len(entries), kinds[len(entries)]
            together = Pages.together(pair)
            n_pairs += together - 1
            at = int(order[done + page]) if together == 1 else 2 * (len(order) // 2 - n_pairs)
            part = slice(page * PAGE_SLOTS, (page + together) * PAGE_SLOTS)
            centre = mu[i] if mu is not None and pair != ("f16", "f16") else 0
            if masks[page : page + together].any():
                entries += pages.store(pair, at, k[part] - centre, v[part])
            else:  # not written, and so full of NaN: whoever reads it shows
                entries += [0] * together
        first = len(listed)
        listed += [
            (entry, mask, page * PAGE_SLOTS, int(order[done + page]))
            for page, (entry, mask) in enumerate(zip(entries, masks.tolist(), strict=True))
            if mask
        ]
        streams[i] = (len(k), first, len(listed) - first, -1 if mu is None else i, 1, 0, (0, 0))
        done += n_pages[i]
    return pages, streams, np.array(listed, PAGE)


def _by_stream(mass: npt.NDArray[Any], streams: npt.NDArray[Any], listed: npt.NDArray[Any], group: int) -> list[Floats]:
    """``[group, n_slots]`` per stream, from pages of ``[group, slots]``."""
    out = []
    for stream in streams:
        one = np.zeros((group, -(-int(stream["n_slots"]) // PAGE_SLOTS) * PAGE_SLOTS), np.float32)
        for page in listed[stream["first"] : stream["first"] + stream["n_pages"]]:
            one[:, page["slot"] : page["slot"] + PAGE_SLOTS] = mass[page["mass"]].reshape(group, PAGE_SLOTS)
        out.append(one[:, : stream["n_slots"]])
    return out


def attend_stock(
    q: Floats, keys: npt.NDArray[np.float16], values: npt.NDArray[np.float16], *, n_threads: int = 1
) -> Floats:
    """llama.cpp's flash attention for one sequence.

    Args:
        q: ``[n_tokens, n_head, d_k]``, the newest tokens.
        keys: f16 ``[n_head_kv, n_slots, d_k]``; values: f16 ``[n_head_kv, n_slots, d_v]``.
        n_threads: threads.

    Returns:
        ``[n_tokens, n_head, d_v]``.
    """
    n_tokens, n_head, d_k = q.shape
    n_slots, d_v = values.shape[1:]
    mask = np.zeros((n_tokens, n_slots), np.float16)
    for t in range(n_tokens):
        mask[t, n_slots - n_tokens + t + 1 :] = -np.inf
    graph = Graph(2 * (q.nbytes + keys.nbytes + values.nbytes + mask.nbytes) + 4 * n_tokens * n_head * d_v)
    try:
        args = [graph.tensor(a) for a in (np.asarray(q, np.float32).transpose(1, 0, 2), keys, values, mask)]
        out = graph.base.ggml_flash_attn_ext(graph.ctx, *args, d_k**-0.5, 0.0, 0.0)
        graph.base.ggml_flash_attn_ext_set_prec(out, PREC_F32)
        graph.run(n_threads, out)
        return graph.read(out, n_tokens, n_head, d_v)
    finally:
        graph.close()


def reference(
    q: Floats,
    keys: Sequence[npt.NDArray[np.float16]],
    values: Sequence[npt.NDArray[np.float16]],
    *,
    n_seqs: int = 1,
    soft_cap: float = 0.0,
    live: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]]]:
    """What :func:`attend_pages` computes, in f64 and step by step; also the mass."""
    n_tokens, n_head_kv = len(q) // n_seqs, len(keys) // n_seqs
    group = q.shape[1] // n_head_kv
    cap: Callable[[Any], Any] = (lambda z: soft_cap * np.tanh(z / soft_cap)) if soft_cap else (lambda z: z)
    out = np.zeros((len(q), q.shape[1], values[0].shape[1]))
    mass = []
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        s, h = divmod(i, n_head_kv)
        tokens, heads = slice(s * n_tokens, (s + 1) * n_tokens), slice(h * group, (h + 1) * group)
        z = cap(
            np.einsum("tgd,nd->gtn", q[tokens, heads].astype(np.float64), k.astype(np.float64)) * q.shape[2] ** -0.5
        )
        seen = np.arange(len(k))[None, :] <= len(k) - n_tokens + np.arange(n_tokens)[:, None]
        z = np.where(seen if live is None else seen & live[i], z, -np.inf)
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[tokens, heads] = np.einsum("gtn,nd->tgd", p, v.astype(np.float64))
        mass.append(p.sum(1))
    return out, mass
