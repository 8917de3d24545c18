"""The paged cache of one context, as numpy: what it holds, what its window attends to, what to keep."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvlocal.errors import KVError
from kvlocal.native.archive import Archives
from kvlocal.native.formats import BITS, FORMATS, PAGE_SLOTS
from kvlocal.native.retrieval import Retrieval, Retrieved
from kvlocal.native.structs import KvlLayerInfo, KvlRetrievalStats, KvlSeqStats, KvlStats

MassKind = Literal["none", "sum", "last"]
MASS_KINDS: tuple[MassKind, ...] = ("none", "sum", "last")
"""In the order of ``kvl_mass``."""


def _ints(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def _floats(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def _whole(values: Any, what: str) -> np.ndarray:
    """``values`` as int32 ``[n]``; a policy's own code may return anything."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise KVError(f"{what} must be a list of whole numbers, not an array of the shape {array.shape}.")
    if len(array) and array.dtype.kind not in "iu":
        raise KVError(f"{what} must be whole numbers, not {array.dtype}.")
    if len(array) and max(-1 - int(array.min()), int(array.max())) >= 2**31:
        raise KVError(f"{what} go from {array.min()} to {array.max()}, which no cache holds.")
    return np.ascontiguousarray(array, np.int32)


@dataclass(frozen=True)
class Layer:
    """One attention layer: ``il`` is its index in the model, ``d_k`` and ``d_v`` are per head; ``kq_scale`` is what its
    attention logits are multiplied with; ``device`` is where its pages lie, and ``kernels`` whether page kernels read
    them there."""

    il: int
    n_head: int
    n_head_kv: int
    d_k: int
    d_v: int
    kq_scale: float
    device: str = "CPU"
    kernels: bool = True

    def slot_bytes(self, storage: str) -> float:
        """K and V bytes of one slot of one head, stored in one of :data:`FORMATS`."""
        k, v = BITS[storage]
        return (self.d_k * k + self.d_v * v) / 8


class PagedCache(Archives):
    """Reads and evicts the slots of a context made by ``kvl_init_from_model``.

    Layers are counted among the open ones: attention layers whose cache grows with the text. Every method raises
    :class:`~kvlocal.errors.KVError` with the library's reason when it refuses.

    Attributes:
        formats: those of :data:`FORMATS` that the context can store, f16 first.
        kivi_group: slots that share scales in the storage kivi.
        fixed_bytes: most that sliding windows and a recurrent state take of a sequence, whatever the budget; without
            the marks of :meth:`mark`.
    """

    def __init__(self, ctx: Any, formats: Sequence[str] = (), kivi_group: int = 32) -> None:
        self.kivi_group = kivi_group
        super().__init__(ctx)
        self.formats = tuple(name for name in FORMATS if name == "f16" or name in formats)
        self.layers: list[Layer] = []
        for i in range(self._check(self._lib.kvl_n_layer(ctx))):
            info = KvlLayerInfo()
            self._check(self._lib.kvl_get_layer(ctx, i, ctypes.byref(info)))
            shape = (info.il, info.n_head, info.n_head_kv, info.d_k, info.d_v, info.kq_scale)
            self.layers.append(Layer(*shape, info.device.decode("utf-8", "replace"), bool(info.kernels)))
        self.fixed_bytes = int(self.seq_stats(0).fixed_limit)

    def _layer(self, layer: int) -> Layer:
        if not 0 <= layer < len(self.layers):
            raise KVError(f"Layer {layer} is not below {len(self.layers)}.")
        return self.layers[layer]

    def _slots(self, layer: int, slots: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Slot indices per KV head as the counts and one array; the library checks their order and range."""
        n = self._layer(layer).n_head_kv
        if len(slots) != n:
            raise KVError(f"There are slots for {len(slots)} heads, but layer {layer} has {n} KV heads.")
        of = [_whole(s, f"Slots (layer {layer}, KV head {h})") for h, s in enumerate(slots)]
        return np.array([len(s) for s in of], np.int32), np.concatenate([*of, np.zeros(1, np.int32)])

    @property
    def bytes_per_token(self) -> int:
        """K and V bytes of one token held in every head of every layer, f16."""
        return sum(layer.n_head_kv * (layer.d_k + layer.d_v) * 2 for layer in self.layers)

    #
    # read
    #

    def stats(self) -> KvlStats:
        out = KvlStats()
        self._check(self._lib.kvl_get_stats(self._ctx, ctypes.byref(out), 0, None, None, None))
        return out

    def seq_stats(self, seq: int) -> KvlSeqStats:
        out = KvlSeqStats()
        self._check(self._lib.kvl_get_stats(self._ctx, None, seq, ctypes.byref(out), None, None))
        return out

    def lengths(self, seq: int, layer: int) -> np.ndarray:
        """Slots held per KV head, int32 ``[n_head_kv]``."""
        out = np.empty(self._layer(layer).n_head_kv, np.int32)
        self._check(self._lib.kvl_slots(self._ctx, seq, layer, _ints(out), 0, None, None, None))
        return out

    def positions(self, seq: int, layer: int) -> list[np.ndarray]:
        """True positions per KV head, int32 ``[n_slots]``, ascending."""
        return self._slot_arrays(seq, layer, "pos")[0]

    def slot_formats(self, seq: int, layer: int) -> list[np.ndarray]:
        """How the slots are stored per KV head: index into :data:`FORMATS`, int32 ``[n_slots]``."""
        return self._slot_arrays(seq, layer, "format")[0]

    def slot_pages(self, seq: int, layer: int) -> list[np.ndarray]:
        """In which of the head's pages the slots lie, per KV head int32 ``[n_slots]``."""
        return self._slot_arrays(seq, layer, "page")[0]

    def kivi_groups(self, seq: int, layer: int) -> list[np.ndarray]:
        """Which kivi group of the head the slots lie in, per KV head int32 ``[n_slots]``, -1: in none.

        A group takes the bytes of :attr:`kivi_group` slots until the last of its slots is evicted.
        """
        out = []
        for formats, pages in zip(*self._slot_arrays(seq, layer, "format", "page"), strict=True):
            first = 1 + max(pages[formats == FORMATS.index("token2")], default=-1)  # kivi pages come next
            group = (pages - first) * PAGE_SLOTS // self.kivi_group
            out.append(np.where(formats == FORMATS.index("kivi"), group, -1).astype(np.int32))
        return out

    def _slot_arrays(self, seq: int, layer: int, *names: Literal["pos", "format", "page"]) -> list[list[np.ndarray]]:
        """What ``kvl_slots`` says of every slot, per name and KV head."""
        lengths = self.lengths(seq, layer)
        n = int(lengths.sum())
        out: dict[str, np.ndarray] = {name: np.empty(n, np.int32) for name in names}
        at = [_ints(out[name]) if name in out else None for name in ("pos", "format", "page")]
        self._check(self._lib.kvl_slots(self._ctx, seq, layer, _ints(lengths), n, *at))
        return [np.split(out[name], np.cumsum(lengths)[:-1]) for name in names]

    def window_scores(self, seq: int, layer: int, n_queries: int = 0, rms: bool = False) -> np.ndarray:
        """Mean attention of the last ``n_queries`` remembered queries (0: all), float32 ``[n_head, longest head]``.

        ``rms``: the root of the mean of the squares.
        """
        out = np.empty((self._layer(layer).n_head, int(self.lengths(seq, layer).max())), np.float32)
        self._check(self._lib.kvl_window_scores(self._ctx, seq, layer, n_queries, rms, _floats(out), out.shape[1]))
        return out

    def mass(self, seq: int, layer: int) -> np.ndarray:
        """What every slot received since :meth:`accumulate_mass`, float32 ``[n_head, longest head]``."""
        out = np.empty((self._layer(layer).n_head, int(self.lengths(seq, layer).max())), np.float32)
        self._check(self._lib.kvl_slot_mass(self._ctx, seq, layer, _floats(out), out.shape[1], False))
        return out

    def keys_values(self, seq: int, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Stored keys (after RoPE) ``[n_slots, d_k]`` and values ``[n_slots, d_v]`` of one KV head, float32."""
        lengths = self.lengths(seq, layer)
        if not 0 <= head < len(lengths):
            raise KVError(f"KV head {head} is not below {len(lengths)}.")
        n = int(lengths[head])
        k = np.empty((n, self._layer(layer).d_k), np.float32)
        v = np.empty((n, self._layer(layer).d_v), np.float32)
        self._check(self._lib.kvl_read_kv(self._ctx, seq, layer, head, _floats(k), _floats(v)))
        return k, v

    def value_norms(self, seq: int, layer: int) -> list[np.ndarray]:
        """Euclidean norms of the values per KV head, float32 ``[n_slots]``."""
        lengths = self.lengths(seq, layer)
        out = np.empty(int(lengths.sum()), np.float32)
        self._check(self._lib.kvl_value_norms(self._ctx, seq, layer, _floats(out)))
        return np.split(out, np.cumsum(lengths)[:-1])

    def queries(self, seq: int, layer: int, n_queries: int) -> np.ndarray:
        """The last remembered queries (after RoPE), oldest first, float32 ``[<= n_queries, n_head, d_k]``."""
        out = np.empty((n_queries, self._layer(layer).n_head, self._layer(layer).d_k), np.float32)
        return out[: self._check(self._lib.kvl_read_queries(self._ctx, seq, layer, n_queries, _floats(out)))]

    def rotate(self, layer: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """A layer's RoPE at int32 ``[n]`` positions (negative: back) applied to ``[n, d_k]``; float32, angles only."""
        out, at = np.array(rows, np.float32, order="C"), _whole(positions, "Positions")
        if out.shape != (len(at), self._layer(layer).d_k):
            raise KVError(f"Rows {out.shape} do not fit {len(at)} positions of {self._layer(layer).d_k} values.")
        self._check(self._lib.kvl_rotate(self._ctx, layer, len(out), _floats(out), _ints(at)))
        return out

    def held(self, seq: int) -> list[np.ndarray]:
        """Slots held, per layer int32 ``[n_head_kv]``."""
        return [self.lengths(seq, layer) for layer in range(len(self.layers))]

    def mean_slots(self, seq: int) -> int:
        """Slots held per layer and KV head on average, rounded up."""
        stats = self.seq_stats(seq)
        return int(-(-stats.n_slots // stats.n_heads))

    #
    # change
    #

    def keep(self, seq: int, layer: int, slots: Sequence[np.ndarray]) -> None:
        """Keep these slot indices of every KV head (ascending) and free the rest."""
        counts, flat = self._slots(layer, slots)
        self._check(self._lib.kvl_keep(self._ctx, seq, layer, _ints(counts), _ints(flat)))

    def demote(self, seq: int, layer: int, slots: Sequence[np.ndarray], storage: str) -> None:
        """Store these slot indices of every KV head (ascending) in another of :data:`FORMATS` than f16.

        What is there already stays as it is. The context must have been made with the format. To kivi go multiples of
        :attr:`kivi_group` slots per head, which are grouped as they come; from kivi there is no way to another format.
        """
        counts, flat = self._slots(layer, slots)
        kind = FORMATS.index(storage)
        self._check(self._lib.kvl_demote(self._ctx, seq, layer, kind, _ints(counts), _ints(flat), 0, 0))

    def demote_due(self, seq: int, layer: int, positions: np.ndarray, storage: str, n_most: int = 0) -> int:
        """Store in another format what the heads have in f16 at these positions (ascending).

        ``n_most`` slots per head at most, the earliest (0: all); of kivi whole groups only.

        Returns:
            How many slots were demoted.
        """
        at = _whole(positions, "Positions to demote")
        kind = FORMATS.index(storage)
        return self._check(self._lib.kvl_demote(self._ctx, seq, layer, kind, None, _ints(at), len(at), n_most))

    def set_mu(self, seq: int, layer: int, mu: np.ndarray) -> None:
        """Mean of the keys per head, float32 ``[n_head_kv, d_k]``: demoted keys are stored without it, attention adds
        it back. Fails once a slot of the layer is demoted; kept until the sequence is emptied.
        """
        mu, want = np.ascontiguousarray(mu, np.float32), (self._layer(layer).n_head_kv, self._layer(layer).d_k)
        if mu.shape != want:
            raise KVError(f"The mean of the keys has the shape {mu.shape}; layer {layer} needs {want}.")
        self._check(self._lib.kvl_set_mean(self._ctx, seq, layer, _floats(mu), 0, 0, 0))

    def centre(self, seq: int, layer: int, first: int, end: int, n_least: int = 1) -> int:
        """Use the mean of the f16 keys at positions ``[first, end)`` as the mean of later demotions (:meth:`set_mu`).
        No effect if one is set.

        Returns:
            The most such keys of a head, or ``n_least`` if a mean was set already; if they are fewer, none is set.
        """
        return self._check(self._lib.kvl_set_mean(self._ctx, seq, layer, None, first, end, n_least))

    def select(self, seq: int, layer: int, slots: Sequence[np.ndarray] | None) -> None:
        """Let attention see only these slot indices of every KV head (ascending) and what comes later; ``None``: all.

        Holds until the next call, wherever these slots move; nothing moves now.
        """
        if slots is None:
            self._check(self._lib.kvl_select(self._ctx, seq, layer, None, None))
            return
        counts, flat = self._slots(layer, slots)
        self._check(self._lib.kvl_select(self._ctx, seq, layer, _ints(counts), _ints(flat)))

    def index(self, seq: int, retrieval: Retrieval, ends: Sequence[int] = ()) -> None:
        """Take up the keys of new tokens into what stands for their units, as they are stored now.

        ``ends``: how many tokens come before the end of each unit that has closed since the last call, ascending, all
        before the last token. Cutting a sequence opens the units that end at its new length or later again.
        """
        closed = _whole(ends, "The ends of units")
        self._check(
            self._lib.kvl_retrieve(self._ctx, seq, ctypes.byref(retrieval.native), _ints(closed), len(closed), None)
        )

    def retrieve(self, seq: int, retrieval: Retrieval, ends: Sequence[int] = ()) -> Retrieved:
        """Choose which units the next tokens read, until the next call or :meth:`select`, after :meth:`index`."""
        closed, out = _whole(ends, "The ends of units"), KvlRetrievalStats()
        params = ctypes.byref(retrieval.native)
        self._check(self._lib.kvl_retrieve(self._ctx, seq, params, _ints(closed), len(closed), ctypes.byref(out)))
        chosen = (out.n_units, out.index_bytes, out.us, out.n_read, out.n_wanted, out.n_kept, bool(out.full))
        return Retrieved(*chosen, out.n_recalled, out.n_loaded, out.n_missed, out.read_bytes)

    def read_all(self, seq: int) -> None:
        """Let attention see everything that is held."""
        self._check(self._lib.kvl_retrieve(self._ctx, seq, None, None, 0, None))

    def accumulate_mass(self, kind: MassKind = "sum") -> None:
        """Accumulate from now on, per query head, what every slot receives; from zero.

        ``sum``: attention from all queries. ``last``: the position + 1 of the last query that gave the slot at least
        the mean of what it saw, a probability of 1 / slots seen; 0: none did.

        Raises:
            UsageError: the context computes attention without the page kernels.
        """
        self._check(self._lib.kvl_set_mass(self._ctx, MASS_KINDS.index(kind)))

    def set_mass(self, seq: int, layer: int, mass: np.ndarray) -> None:
        """Replace the accumulated mass, float32 ``[n_head, >= longest head]``."""
        mass = np.ascontiguousarray(mass, np.float32)
        if mass.ndim != 2 or len(mass) != self._layer(layer).n_head:
            raise KVError(
                f"The mass has the shape {mass.shape}; layer {layer} needs a row for each of its "
                f"{self._layer(layer).n_head} query heads."
            )
        self._check(self._lib.kvl_slot_mass(self._ctx, seq, layer, _floats(mass), mass.shape[1], True))

    def branch(self, src: int, dst: int) -> None:
        """Make ``dst`` a copy of ``src`` that shares its pages until one of them writes."""
        self._check(self._lib.kvl_branch(self._ctx, src, dst))

    def roll(self, seq: int) -> None:
        """Renumber: slot ``i`` of every head gets position ``i``, its key is turned there, the next token comes after.

        All heads must hold the same number of slots. Keys are stored in f16, so each call rounds them once more.
        """
        self._check(self._lib.kvl_roll(self._ctx, seq))

    def truncate(self, seq: int, n: int) -> None:
        """Remove the tokens at positions >= n from every head.

        Raises:
            KVError: there is no way back to there, see :meth:`reach`; nothing has changed.
        """
        self._check(self._lib.kvl_truncate(self._ctx, seq, n))

    def reach(self, seq: int, n: int) -> int:
        """The most tokens up to ``n`` that a sequence can be truncated to: ``n`` itself, unless a sliding window or a
        recurrent state has gone on; then a place that was marked, or 0."""
        return int(self._check(self._lib.kvl_reach(self._ctx, seq, n)))

    def mark(self, seq: int) -> None:
        """Remember the way back to here, of the two latest calls. It takes memory (``fixed_bytes``) where the model has
        a sliding window or a recurrent state, else nothing."""
        self._check(self._lib.kvl_mark(self._ctx, seq))

    def trim(self) -> None:
        """Give the scratch memory of an eviction back to the operating system."""
        self._check(self._lib.kvl_trim(self._ctx))

    def reset_peak(self) -> None:
        self._check(self._lib.kvl_reset_peak(self._ctx))
