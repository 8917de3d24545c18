"""A llama.cpp context with paged or stock memory, driven token by token."""

from __future__ import annotations

import ctypes
import mmap
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from kvlocal.errors import KVError, UsageError
from kvlocal.native import library
from kvlocal.native.cache import MassKind, PagedCache
from kvlocal.native.fork import check_process, is_forked
from kvlocal.native.formats import FORMATS
from kvlocal.native.model import Model
from kvlocal.native.spinning import SleepingPool
from kvlocal.native.structs import KvlBreakdown, KvlParams, KvlStats
from kvlocal.native.threads import default_threads

_GGML_TYPES = {"f32": 0, "f16": 1, "q4": 2, "q8": 8}  # upstream's ggml_type


@dataclass(frozen=True)
class ContextConfig:
    """How a context is made.

    Attributes:
        n_ctx: tokens per sequence that the cache has room for.
        n_batch: most tokens of one :meth:`Context.decode`; n_ubatch: of one pass through the graph.
        n_threads: 0: the physical cores; see :func:`kvlocal.native.threads.default_threads`.
        n_seq_max: number of sequences.
        n_outputs: most positions of one batch whose logits are read.
        paged: our memory, or the stock cache.
        n_window: queries remembered for window scores (paged).
        mass: what every slot receives is accumulated (paged); see :meth:`PagedCache.accumulate_mass`.
        n_pool_ctx: tokens per head and sequence the pool has room for (paged; 0 = n_ctx).
        type_kv: storage of the stock cache; ``q8`` and ``q4`` are upstream's q8_0 and q4_0.
        flash_attn: flash attention over the stock cache.
        formats: storage that slots may be demoted to, of :data:`kvlocal.native.formats.FORMATS` (paged).
        rotate: keys and values are rotated before they are stored: q4, kv3 and kv2 need it (paged).
        kivi_bits: bits per code of the storage kivi, 2 or 4; kivi_group: how many slots (of keys) and channels (of
            values) share a scale there, 32 or 64 (paged).
        window_format: storage of sliding windows, f16 or q8 (paged).
        portable: attention with stock operators even where a page kernel exists (paged; the reference in tests).
    """

    n_ctx: int
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 0
    n_seq_max: int = 1
    n_outputs: int = 0
    paged: bool = True
    n_window: int = 32
    mass: MassKind = "none"
    n_pool_ctx: int = 0
    formats: tuple[str, ...] = ()
    rotate: bool = False
    kivi_bits: int = 2
    kivi_group: int = 32
    type_kv: Literal["f16", "f32", "q8", "q4"] = "f16"
    flash_attn: bool = True
    window_format: Literal["f16", "q8"] = "f16"
    portable: bool = False

    def serves(self, other: ContextConfig) -> bool:
        """Whether a context of these settings can do what one of the others does."""
        less = replace(self, n_window=other.n_window, mass=other.mass, formats=other.formats, rotate=other.rotate)
        return (
            less == other
            and other.n_window <= self.n_window
            and other.mass in ("none", self.mass)
            and set(other.formats) <= set(self.formats)
            and (other.rotate == self.rotate or not other.formats)
        )


def _release(llama: Any, handle: Any, pools: list[SleepingPool]) -> None:
    # a forked child has no threads to end, and would wait for them
    while pools and not is_forked():
        pools.pop().close()
    llama.llama_free(handle)


class Context:
    """Owns a llama_context. ``cache`` is its :class:`PagedCache`, ``None`` over the stock cache.

    ``n_decoded`` counts the calls of :meth:`decode`: the logits are those of the last one.
    """

    def __init__(self, model: Model, config: ContextConfig) -> None:
        self._native = library.load()
        self._llama = self._native.llama
        self.model = model
        self.config = config
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max"):
            value = getattr(config, name)
            if not 1 <= value <= 2**30:  # beyond that, C's integers wrap
                raise UsageError(f"{name} is {value}; it must be 1 to {2**30}.")
        self.n_threads = config.n_threads or default_threads()
        params = self._llama.llama_context_default_params()
        params.n_ctx = config.n_ctx
        # buffers are made for the largest batch, and none is larger than what the cache can hold
        most = config.n_ctx * (config.n_seq_max if config.paged else 1)
        self._n_batch = min(config.n_batch, max(most, config.n_seq_max))
        params.n_batch = self._n_batch
        params.n_ubatch = min(config.n_ubatch, self._n_batch)
        params.n_threads = params.n_threads_batch = self.n_threads
        params.n_seq_max = config.n_seq_max
        params.n_outputs_max = max(config.n_outputs, config.n_seq_max)
        params.kv_unified = True
        self._native.log.clear()
        kvl = None
        if config.paged:
            formats = sum(1 << FORMATS.index(name) for name in config.formats)
            kvl = KvlParams(
                config.n_window, config.n_pool_ctx, 64 << 20, config.portable, formats, config.rotate,
                config.kivi_bits, config.kivi_group, FORMATS.index(config.window_format),
            )  # fmt: skip
        else:
            params.type_k = params.type_v = _GGML_TYPES[config.type_kv]
            params.flash_attn_type = 1 if config.flash_attn else 0
            params.swa_full = False  # a window takes no more than it sees, as in llama.cpp's own programs
        at = ctypes.byref(kvl) if kvl is not None else None
        handle = self._native.lib.kvl_init_from_model(model.handle, params, at)
        if not handle:
            if self._native.last_error():
                self._native.check(library.ERR_UNSUPPORTED)
            raise KVError(f"llama.cpp cannot create a context of {config.n_ctx} tokens: {self._why()}.")
        self._handle: Any = handle
        self._pools: list[SleepingPool] = []
        self._free = weakref.finalize(self, _release, self._llama, handle, self._pools)
        if not self._native.openmp and not model.no_alloc:
            self._pools.append(self._make_pool())
        self.cache = PagedCache(self.handle, config.formats, config.kivi_group or 32) if config.paged else None
        if self.cache is not None and config.mass != "none":
            try:
                self.cache.accumulate_mass(config.mass)
            except BaseException:
                self.close()
                raise
        self._make_batch(self._n_batch)
        self.n_decoded = 0

    def _make_pool(self) -> SleepingPool:
        base, cpu = library.open_library("ggml-base"), library.open_library("ggml-cpu")
        return SleepingPool(base, cpu, self._native.lib, self.handle, self.n_threads)

    def _why(self) -> str:
        line = self._native.log[-1] if self._native.log else "its log gives no reason"
        return re.sub(r"^\w+: ", "", line).rstrip(".")

    def _make_batch(self, n: int) -> None:
        """One batch for all calls, over numpy arrays: filling it costs no Python loop."""
        self._tokens = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._seq = np.zeros(n, np.int32)
        self._output = np.zeros(n, np.int8)
        self._kept: np.ndarray | None = None  # logits of a decode in parts
        # seq_id is an array of pointers: the i-th points to the i-th entry of _seq
        self._seq_ptr = self._seq.ctypes.data + np.arange(n, dtype=np.uint64) * 4
        batch = self._llama.llama_batch()

        def pointer(array: np.ndarray, field: str) -> Any:
            kind = dict(self._llama.llama_batch._fields_)[field]
            return ctypes.cast(array.ctypes.data, kind)

        batch.token = pointer(self._tokens, "token")
        batch.pos = pointer(self._pos, "pos")
        batch.n_seq_id = pointer(self._n_seq, "n_seq_id")
        batch.seq_id = pointer(self._seq_ptr, "seq_id")
        batch.logits = pointer(self._output, "logits")
        self._batch = batch

    def close(self) -> None:
        """Give the memory back; happens by itself when nobody holds the context any more."""
        self._free()
        self._handle = None
        if self.cache is not None:
            self.cache.close()

    @property
    def _memory(self) -> Any:
        return self._llama.llama_get_memory(self.handle)

    @property
    def closed(self) -> bool:
        return self._handle is None

    @property
    def handle(self) -> Any:
        """The llama_context.

        Raises:
            KVError: it was closed.
        """
        if self._handle is None:
            raise KVError("The cache was closed with its model; load the model again to go on.")
        return self._handle

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    #
    # decode
    #

    def decode(
        self,
        tokens: Sequence[int] | np.ndarray,
        pos: int | np.ndarray,
        seq: int | np.ndarray = 0,
        *,
        outputs: Literal["last", "all", "none"] = "last",
    ) -> None:
        """Run tokens through the model. ``pos`` and ``seq`` are per token, or the first position and the sequence of
        all of them. More than ``n_batch`` tokens are computed in parts.

        Raises:
            KVError: no room in the cache, the computation failed, or this is a forked process; the sequences are as
                before, or empty if a recurrent state cannot be taken back.
        """
        check_process()
        self.n_decoded += 1
        n = len(tokens)
        where = np.arange(pos, pos + n) if isinstance(pos, int) else np.asarray(pos)
        whose = np.full(n, seq) if isinstance(seq, int) else np.asarray(seq)
        read = np.full(n, outputs == "all")
        if outputs == "last":
            # the last token of every sequence
            last = {seq: n - 1} if isinstance(seq, int) else {int(s): i for i, s in enumerate(whose)}
            read[[i for i in last.values() if i >= 0]] = True
        size = self._n_batch
        self._kept = None
        if n <= size:
            self._decode(tokens, where, whose, read)
            return
        kept = []
        for i in range(0, n, size):
            part = slice(i, i + size)
            try:
                self._decode(tokens[part], where[part], whose[part], read[part])
            except BaseException:
                for s in np.unique(whose[:i]) if i else ():
                    self.truncate(int(s), int(where[whose == s][0]))
                raise
            if read[part].any():
                kept.append(self.logits(int(read[part].sum())))
        self._kept = np.concatenate(kept) if kept else None

    def _decode(self, tokens: Any, pos: np.ndarray, seq: np.ndarray, outputs: np.ndarray) -> None:
        """One batch of at most ``n_batch`` tokens."""
        n = len(tokens)
        self._tokens[:n] = tokens
        self._pos[:n] = pos
        self._seq[:n] = seq
        self._output[:n] = outputs
        self._batch.n_tokens = n
        self._native.log.clear()
        status = self._native.lib.kvl_decode(self.handle, self._batch)
        if status == 1 and self.cache is None:
            raise KVError(
                f"The context of {self.config.n_ctx} tokens is full; use a larger one (-c) or a policy that evicts."
            )
        if status != 0:
            reason = self._native.last_error()
            detail = f": {self._why()}" if self._native.log and self.cache is None else ""
            raise KVError(f"{reason[0].upper()}{reason[1:]}{detail}.")

    def logits(self, n: int = 1) -> np.ndarray:
        """Logits of the first n outputs of the last :meth:`decode`, float32 ``[n, n_vocab]``, a copy."""
        if self._kept is not None:
            return self._kept[:n].copy()
        pointer = self._llama.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(pointer, (n, self.model.n_vocab)).copy()

    #
    # sequences
    #

    @property
    def n_cells(self) -> int:
        """Tokens that the stock cache has room for; llama.cpp rounds up what it was asked for."""
        return int(self._llama.llama_n_ctx(self.handle))

    def n_seen(self, seq: int) -> int:
        """Tokens of a sequence: its next position."""
        return int(self._llama.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def reach(self, seq: int, n: int) -> int:
        """The most tokens up to ``n`` that a sequence can be truncated to and go on from there: a sliding window has
        given back what lies before it, a recurrent state cannot go back but to a :meth:`mark`."""
        if self.cache is not None:
            return self.cache.reach(seq, n)
        return n if self._stock_reaches(seq, n) else 0

    def mark(self, seq: int) -> None:
        """Remember the way back to here, as :meth:`PagedCache.mark` does it; the stock cache knows no marks."""
        if self.cache is not None:
            self.cache.mark(seq)

    def _stock_reaches(self, seq: int, n: int) -> bool:
        if n == 0:
            return True
        if self._llama.llama_model_is_recurrent(self.model.handle) or self._llama.llama_model_is_hybrid(
            self.model.handle
        ):
            return n == self.n_seen(seq)
        first = int(self._llama.llama_memory_seq_pos_min(self._memory, seq))
        return first <= max(n - int(self._llama.llama_model_n_swa(self.model.handle)), 0)

    def truncate(self, seq: int, n: int) -> bool:
        """Remove the tokens at positions >= n; ``False`` if the memory cannot, and nothing has changed."""
        if self.cache is not None:
            if self.n_seen(seq) > n and self.reach(seq, n) != n:
                return False
            self.cache.truncate(seq, n)
            return True
        return bool(self._llama.llama_memory_seq_rm(self._memory, seq, n, -1))

    def branch(self, src: int, dst: int) -> None:
        """Make ``dst`` a copy of ``src``; its pages (or cells) are shared."""
        if self.cache is not None:
            self.cache.branch(src, dst)
        else:
            self._llama.llama_memory_seq_rm(self._memory, dst, -1, -1)
            self._llama.llama_memory_seq_cp(self._memory, src, dst, -1, -1)

    def join(self, src: int, dst: int) -> None:
        """Move what the stock cache holds of ``src`` behind ``dst``; positions stay as they are."""
        self._llama.llama_memory_seq_cp(self._memory, src, dst, -1, -1)
        self._llama.llama_memory_seq_rm(self._memory, src, -1, -1)

    def save(self, seq: int) -> memoryview:
        """The cache of a sequence as it is: page tables, positions, pages, remembered queries. The one copy that is
        made; write it to a file as it is.

        Raises:
            KVError: it cannot be written, or there is no memory for the copy.
        """
        self._native.log.clear()
        size = self._llama.llama_state_seq_get_size(self.handle, seq)
        try:
            copy = np.empty(size, np.uint8)
        except MemoryError:
            raise KVError(f"No memory for the {size / 2**20:.0f} MiB of the cache of sequence {seq}.") from None
        at = copy.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not size or self._llama.llama_state_seq_get_data(self.handle, at, size, seq) != size:
            raise KVError(f"The cache of sequence {seq} cannot be saved: {self._why()}.")
        return copy.data

    def restore(self, seq: int, saved: bytes | bytearray | memoryview | mmap.mmap) -> None:
        """Put what :meth:`save` gave in the place of a sequence; it must come from a context with these settings.

        ``saved`` is read where it lies: bytes, a memoryview, or a file that is mapped (:mod:`mmap`).

        Raises:
            KVError: it does not, or is damaged; the sequence is as before, or empty if it had to make room.
        """
        self._native.log.clear()
        there = np.frombuffer(saved, np.uint8) if memoryview(saved).nbytes else np.empty(0, np.uint8)
        at = there.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n = there.nbytes
        n_read = self._llama.llama_state_seq_set_data(self.handle, at, n, seq)
        del at, there  # an error's traceback would keep them, and a mapped file can then not be closed
        if n_read != n or not n_read:
            if n_read:  # what is left over belongs to something else
                self.truncate(seq, 0)
            raise KVError(f"The saved cache cannot be restored: {self._why()}.")

    def stats(self) -> KvlStats:
        """Bytes of the cache, paged or stock."""
        out = KvlStats()
        self._native.check(self._native.lib.kvl_get_stats(self.handle, ctypes.byref(out), 0, None, None, None))
        return out

    def breakdown(self, *, on_device: bool = False) -> KvlBreakdown:
        """Bytes of weights, cache and compute buffers in main memory, or on accelerators.

        Of a model without weights (``no_alloc``): what they would be.
        """
        out = KvlBreakdown()
        at = (None, ctypes.byref(out)) if on_device else (ctypes.byref(out), None)
        self._native.check(self._native.lib.kvl_get_stats(self.handle, None, 0, None, *at))
        return out
