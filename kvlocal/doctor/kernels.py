"""One attention operator by itself, without a model: the page kernels and llama.cpp's, for checks and measurements."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.native import library
from kvlocal.native.fork import check_process
from kvlocal.native.formats import PAGE_SLOTS

Floats = npt.NDArray[np.float32]

FEW_ROWS = 24
"""Rows (tokens x query heads of a group) up to which a stream's pages are split among threads, as in kvl-attn.h."""

_F32, _F16, _I32 = 0, 1, 26  # GGML_TYPE_*
_PREC_F32, _ALL_THREADS = 10, -1


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _AttnParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n_head", "n_head_kv", "n_seqs", "n_seq_tokens", "n_split", "n_kv")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("mass", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("formats", ctypes.c_void_p),
        ("mu", ctypes.c_void_p),
    )


class _Format(ctypes.Structure):
    _fields_ = (
        ("k_row", ctypes.c_int),
        ("v_row", ctypes.c_int),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
    )


_PAGE_FORMATS, _PAGE_FORMAT_SHIFT = 8, 28

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
    _libraries()[1].kvl_rows_encode(ROWS.index(row), x.ctypes.data, *x.shape, out.ctypes.data)
    return out


def decode_rows(row: str, stored: npt.NDArray[np.uint8], *, plain: bool = False) -> Floats:
    """What :func:`encode_rows` stored, float32 ``[n, d]``; ``plain``: by code that the vector code must equal.

    That is C in plain loops, and numpy for the formats that have none (kivi, token2).
    """
    check_process()
    values, size = _BLOCKS[row]
    stored = np.ascontiguousarray(stored)
    out = np.empty((len(stored), stored.shape[1] * values // size), np.float32)
    d, library = out.shape[1], _libraries()[1]
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


@functools.cache
def _libraries() -> tuple[Any, Any]:
    """ggml-base and ggml-cpu, as loaded by :func:`kvlocal.native.library.load`."""
    base, cpu = library.open_library("ggml-base"), library.open_library("ggml-cpu")
    ptr, i64, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    functions: tuple[tuple[Any, str, Any, list[Any]], ...] = (
        (base, "ggml_init", ptr, [_InitParams]),
        (base, "ggml_free", None, [ptr]),
        (base, "ggml_new_tensor_4d", ptr, [ptr, ctypes.c_int, i64, i64, i64, i64]),
        (base, "ggml_get_data", ptr, [ptr]),
        (
            base,
            "ggml_custom_4d",
            ptr,
            [ptr, ctypes.c_int, i64, i64, i64, i64, ptr, ctypes.c_int, ptr, ctypes.c_int, ptr],
        ),
        (base, "ggml_flash_attn_ext", ptr, [ptr, ptr, ptr, ptr, ptr, real, real, real]),
        (base, "ggml_flash_attn_ext_set_prec", None, [ptr, ctypes.c_int]),
        (base, "ggml_new_graph", ptr, [ptr]),
        (base, "ggml_build_forward_expand", None, [ptr, ptr]),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [ptr, ptr, ctypes.c_int]),
        (cpu, "kvl_rows_encode", None, [ctypes.c_int, ptr, ctypes.c_int, ctypes.c_int, ptr]),
        (cpu, "kvl_rows_decode", None, [ctypes.c_int, ptr, *[ctypes.c_int] * 3, ptr, ctypes.c_int]),
        (cpu, "kvl_row_decode_ref", None, [ctypes.c_int, ptr, ctypes.c_int, ptr]),
    )
    for where, name, result, arguments in functions:
        function = getattr(where, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu


class _Graph:
    """A ggml graph over numpy data, in memory of its own."""

    def __init__(self, n_bytes: int) -> None:
        self.base, self.cpu = _libraries()
        self.ctx = self.base.ggml_init(_InitParams(n_bytes + (16 << 20), None, False))
        self.graph = self.base.ggml_new_graph(self.ctx)

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """A tensor that holds ``array``; its shape is that of the array, last axis first."""
        kind = {np.dtype(np.float32): _F32, np.dtype(np.float16): _F16, np.dtype(np.int32): _I32}[array.dtype]
        data = np.ascontiguousarray(array)
        shape = [*array.shape[::-1], 1, 1, 1][:4]
        tensor = self.base.ggml_new_tensor_4d(self.ctx, kind, *shape)
        ctypes.memmove(self.base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
        return tensor

    def custom(self, name: str, args: Sequence[Any], params: _AttnParams, *shape: int) -> Any:
        shape4 = [*shape, 1, 1, 1][:4]
        array = (ctypes.c_void_p * len(args))(*args)
        function = ctypes.cast(getattr(self.cpu, name), ctypes.c_void_p)
        return self.base.ggml_custom_4d(
            self.ctx, _F32, *shape4, array, len(args), function, _ALL_THREADS, ctypes.addressof(params)
        )

    def run(self, n_threads: int, *results: Any) -> None:
        check_process()
        for result in results:
            self.base.ggml_build_forward_expand(self.graph, result)
        status = self.cpu.ggml_graph_compute_with_ctx(self.ctx, self.graph, n_threads)
        assert status == 0, f"the graph failed with status {status}"

    def read(self, tensor: Any, *shape: int) -> Floats:
        n = int(np.prod(shape))
        pointer = ctypes.cast(self.base.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (n,)).reshape(shape).copy()

    def close(self) -> None:
        self.base.ggml_free(self.ctx)


class _Pools:
    """Pools of the pages that are not f16, one per pair of row formats, and the entries of the page tables."""

    def __init__(
        self,
        order: npt.NDArray[np.int32],
        first: npt.NDArray[Any],
        keys: Sequence[npt.NDArray[Any]],
        values: Sequence[npt.NDArray[Any]],
        stored: Sequence[Sequence[tuple[str, str]]],
        mu: Sequence[Floats] | None,
    ) -> None:
        self.entries = order.copy()
        self.formats = (_Format * _PAGE_FORMATS)()
        self._kept: list[Any] = []  # what the C side points into
        pools: dict[tuple[str, str], tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}
        n_pairs = 0
        for i, pages in enumerate(stored):
            paired = False  # this page and the one before lie in one group
            for page, kinds in enumerate(pages):
                if kinds == ("f16", "f16") or paired:
                    paired = False
                    continue
                paired = group_slots(kinds[0]) > PAGE_SLOTS
                part = slice(page * PAGE_SLOTS, (page + 1 + paired) * PAGE_SLOTS)
                k = encode_rows(kinds[0], keys[i][part] - (mu[i] if mu else 0))
                v = encode_rows(kinds[1], values[i][part])
                if kinds not in pools:
                    # bytes of 255 are NaN wherever they are a scale
                    shapes = [(len(order) * PAGE_SLOTS, rows.shape[1]) for rows in (k, v)]
                    pool_k, pool_v = (np.full(shape, 255, np.uint8) for shape in shapes)
                    number = len(pools) + 1
                    pools[kinds] = (number, pool_k, pool_v)
                    self.formats[number] = _Format(*map(ROWS.index, kinds), pool_k.ctypes.data, pool_v.ctypes.data)
                number, pool_k, pool_v = pools[kinds]
                at = int(order[first[i] + page])
                if paired:
                    n_pairs += 1
                    at = 2 * (len(order) // 2 - n_pairs)
                self.entries[first[i] + page : first[i] + page + 1 + paired] = [
                    number << _PAGE_FORMAT_SHIFT | at + j for j in range(1 + paired)
                ]
                at *= PAGE_SLOTS
                pool_k[at : at + len(k)], pool_v[at : at + len(v)] = k, v
        self._kept += [*pools.values()]
        self.mu: Any = None
        if mu is not None:
            arrays = [np.ascontiguousarray(m, np.float32) for m in mu]
            self._kept += arrays
            self.mu = (ctypes.c_void_p * len(arrays))(*(m.ctypes.data for m in arrays))


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
    n_head_kv = n_stream // n_seqs
    group = n_head // n_head_kv
    rows = n_tokens * group
    n_pages = [-(-len(k) // PAGE_SLOTS) for k in keys]
    order = np.random.default_rng(seed).permutation(sum(n_pages)).astype(np.int32)
    first = np.r_[0, np.cumsum(n_pages)[:-1]]
    pool_k = np.full((sum(n_pages) * PAGE_SLOTS, d_k), np.nan, np.float16)
    pool_v = np.full((sum(n_pages) * PAGE_SLOTS, d_v), np.nan, np.float16)
    bits = np.zeros((sum(n_pages), PAGE_SLOTS), bool)
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        slots = np.arange(len(k))
        where = order[first[i] + slots // PAGE_SLOTS] * PAGE_SLOTS + slots % PAGE_SLOTS
        pool_k[where], pool_v[where] = k, v
        bits[first[i] + slots // PAGE_SLOTS, slots % PAGE_SLOTS] = True if live is None else live[i]
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)[:, 0]
    pools = _Pools(order, first, keys, values, stored or [], mu)
    table = np.concatenate([[len(k) for k in keys], first, pools.entries, masks]).astype(np.int32)

    mass = [np.zeros((group, len(k)), np.float32) for k in keys]
    pointers = (ctypes.c_void_p * (n_stream * group))(*(m[g].ctypes.data for m in mass for g in range(group)))
    n_kv = -(-max(map(len, keys)) // PAGE_SLOTS) * PAGE_SLOTS
    few = rows <= FEW_ROWS
    params = _AttnParams(
        n_head, n_head_kv, n_seqs, n_tokens, n_split if few else 1, n_kv, d_k**-0.5, soft_cap,
        ctypes.addressof(pointers) if want_mass else None,
        None,
        ctypes.addressof(pools.formats) if stored else None,
        ctypes.addressof(pools.mu) if pools.mu else None,
    )  # fmt: skip
    parts = rows * n_stream * ((d_v + 2) * params.n_split + (n_kv if want_mass else 0))
    size = pool_k.nbytes + pool_v.nbytes + 2 * q.nbytes + 4 * (parts + rows * n_stream * (2 * d_v + 2) + table.size)
    graph = _Graph(size)
    try:
        args = [graph.tensor(a) for a in (np.asarray(q, np.float32), pool_k, pool_v, table)]
        if few and (params.n_split > 1 or want_mass):
            part = graph.custom("kvl_attn_compute", args, params, parts)
            out = graph.custom("kvl_attn_merge", [part, args[3]], params, d_v, n_head, n_tokens * n_seqs)
            graph.run(n_threads, out)
        elif want_mass:
            out = graph.custom("kvl_attn_compute", args, params, (d_v + 2) * rows * n_stream)
            graph.run(n_threads, out, graph.custom("kvl_attn_mass", [*args, out], params, 1))
        else:
            out = graph.custom("kvl_attn_compute", args, params, d_v, n_head, n_tokens * n_seqs)
            graph.run(n_threads, out)
        return graph.read(out, n_tokens * n_seqs, n_head, d_v), mass
    finally:
        graph.close()


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
    graph = _Graph(2 * (q.nbytes + keys.nbytes + values.nbytes + mask.nbytes) + 4 * n_tokens * n_head * d_v)
    try:
        args = [graph.tensor(a) for a in (np.asarray(q, np.float32).transpose(1, 0, 2), keys, values, mask)]
        out = graph.base.ggml_flash_attn_ext(graph.ctx, *args, d_k**-0.5, 0.0, 0.0)
        graph.base.ggml_flash_attn_ext_set_prec(out, _PREC_F32)
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
