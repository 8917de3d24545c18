"""The structs of ``kvl.h`` as ctypes; :class:`kvlocal.native.library.Native` compares their sizes."""

from __future__ import annotations

import ctypes


class KvlParams(ctypes.Structure):
    _fields_ = (
        ("n_window", ctypes.c_int32),
        ("n_pool_ctx", ctypes.c_int32),
        ("score_bytes", ctypes.c_int32),
        ("portable", ctypes.c_int32),
        ("formats", ctypes.c_int32),
        ("rotate", ctypes.c_int32),
        ("kivi_bits", ctypes.c_int32),
        ("kivi_group", ctypes.c_int32),
        ("window_format", ctypes.c_int32),
    )


class KvlStats(ctypes.Structure):
    """Bytes and microseconds, as in ``kvl.h``."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "used_bytes",
            "allocated_bytes",
            "peak_bytes",
            "full_bytes",
            "fixed_bytes",
            "reserved_bytes",
            "table_bytes",
            "query_bytes",
            "index_bytes",
            "recalled_bytes",
            "archive_bytes",
            "n_evict",
            "score_us",
            "keep_us",
        )
    )


class KvlSeqStats(ctypes.Structure):
    _fields_ = (
        ("n_seen", ctypes.c_int64),
        ("n_slots", ctypes.c_int64),
        ("held_min", ctypes.c_int64),
        ("held_max", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("used_bytes", ctypes.c_uint64),
        ("page_bytes", ctypes.c_uint64),
        ("full_bytes", ctypes.c_uint64),
        ("fixed_bytes", ctypes.c_uint64),
        ("fixed_limit", ctypes.c_uint64),
        ("recalled_bytes", ctypes.c_uint64),
        ("archive_bytes", ctypes.c_uint64),
    )


class KvlRetrieval(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "summary",
                "budget",
                "sink",
                "recent",
                "n_queries",
                "min_unit",
                "per_head",
                "partial",
                "dense_layers",
                "full_below",
                "recall",
                "every",
            )
        ),
        ("drift", ctypes.c_float),
        ("hysteresis", ctypes.c_float),
    )


class KvlRetrievalStats(ctypes.Structure):
    _fields_ = (
        ("n_units", ctypes.c_int64),
        ("index_bytes", ctypes.c_uint64),
        ("us", ctypes.c_uint64),
        ("n_read", ctypes.c_float),
        ("n_wanted", ctypes.c_float),
        ("n_kept", ctypes.c_float),
        ("full", ctypes.c_int32),
        ("n_recalled", ctypes.c_float),
        ("n_loaded", ctypes.c_float),
        ("n_missed", ctypes.c_float),
        ("read_bytes", ctypes.c_uint64),
    )


class KvlArchiveStats(ctypes.Structure):
    _fields_ = (
        ("n_units", ctypes.c_int64),
        ("n_lost", ctypes.c_int64),
        ("bytes", ctypes.c_uint64),
        ("error", ctypes.c_char_p),
    )


class KvlLayerInfo(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("il", "n_head", "n_head_kv", "d_k", "d_v", "on_device", "kernels")),
        ("kq_scale", ctypes.c_float),
        ("device", ctypes.c_char_p),
    )


class KvlBreakdown(ctypes.Structure):
    """Bytes, as in ``kvl.h``."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("model_bytes", "context_bytes", "compute_bytes", "free_bytes")
    )
