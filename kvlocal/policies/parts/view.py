"""What a policy sees: numpy views of one sequence, no model and no ctypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class LayerView:
    """What one layer of one sequence holds at the moment of an eviction.

    Heads may be ragged: after an eviction every KV head has its own slots. A *slot index* is a row number inside
    one KV head, 0-based, in ascending order of position.

    Attributes:
        layer: index among the attention layers, 0-based.
        n_head: number of query heads; query head ``h`` reads KV head ``h // (n_head // n_head_kv)``.
        n_head_kv: number of KV heads.
        positions: per KV head, int32 ``[n_slots[h]]``: true token positions, ascending.
        n_seen: number of tokens the sequence has seen; the next token gets this position.
        evicted_at: what ``n_seen`` was at the sequence's last eviction, 0 before the first.
        read_scores: returns float32 ``[n_head, max(n_slots)]``: attention of the last ``n_window`` queries, fp32
            softmax over all slots of the head, mean over the window rows (root mean square, if the policy's
            :attr:`Policy.rms` says so); zero beyond ``n_slots[h]``.
        n_window: number of queries behind ``read_scores`` (at most the ``window`` that the policy asked for).
        read_mass: returns float32 ``[n_head, max(n_slots)]``: attention that every slot has received from all queries
            so far, its own included; zero beyond ``n_slots[h]``. For a policy that needs ``"last"``: the position + 1
            of the last query that gave the slot at least 1 / (slots that the query saw), 0 if none did.
        read_kv: for a KV head, its keys (after RoPE) ``[n_slots[h], d_k]`` and values ``[n_slots[h], d_v]``, float32.
        read_value_norms: per KV head, float32 ``[n_slots[h]]``: Euclidean norms of its values.
        slot_bytes: bytes of a slot's key and value by format, those that the cache can store, most precise first.
        read_formats: per KV head, int32 ``[n_slots[h]]``: how its slots are stored, as index into ``slot_bytes``.
        n_room: slots that one head has room for, 0: any number; n_free: of these, f16 slots that must stay free for
            the tokens that come next.
        read_queries: the last ``n_window`` queries (after RoPE), oldest first, float32 ``[n_window, n_head, d_k]``, at
            the positions ``n_seen - n_window .. n_seen - 1``.
        rotate: applies this layer's RoPE to rows ``[n, d_k]`` at the positions int32 ``[n]`` (negative ones turn back;
            no magnitude is scaled), float32 ``[n, d_k]``.
        kq_scale: what the attention logits are multiplied with (usually ``1 / sqrt(d_k)``).
    """

    layer: int
    n_head: int
    n_head_kv: int
    positions: Sequence[np.ndarray]
    n_seen: int
    read_scores: Callable[[], np.ndarray] | None = None
    n_window: int = 0
    read_mass: Callable[[], np.ndarray] | None = None
    read_kv: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None
    read_queries: Callable[[], np.ndarray] | None = None
    rotate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    kq_scale: float = 0.0
    read_value_norms: Callable[[], Sequence[np.ndarray]] | None = None
    slot_bytes: Mapping[str, float] = field(default_factory=dict)
    read_formats: Callable[[], Sequence[np.ndarray]] | None = None
    n_room: int = 0
    n_free: int = 0
    evicted_at: int = 0
    _scores: np.ndarray | None = field(default=None, repr=False)

    @property
    def n_slots(self) -> np.ndarray:
        """Slots held per KV head, int64 ``[n_head_kv]``."""
        return np.array([len(p) for p in self.positions], dtype=np.int64)

    @property
    def scores(self) -> np.ndarray:
        """Window scores, float32 ``[n_head, max(n_slots)]``; read once and kept until :meth:`release`."""
        if self._scores is None:
            if self.read_scores is None:
                raise ValueError("this view carries no window scores; set `needs = {'scores'}` on the policy")
            self._scores = self.read_scores()
        return self._scores

    @property
    def mass(self) -> np.ndarray:
        """What the slots received, float32 ``[n_head, max(n_slots)]``; see ``read_mass``."""
        if self.read_mass is None:
            raise ValueError("this view carries no attention mass; set `needs = {'mass'}` (or 'last') on the policy")
        return self.read_mass()

    def keys_values(self, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys ``[n_slots[head], d_k]`` and values ``[n_slots[head], d_v]`` of one KV head, float32."""
        if self.read_kv is None:
            raise ValueError("this view carries no keys and values")
        return self.read_kv(head)

    @property
    def value_norms(self) -> Sequence[np.ndarray]:
        """Euclidean norms of the values per KV head, float32 ``[n_slots[h]]``."""
        if self.read_value_norms is None:
            raise ValueError("this view carries no values")
        return self.read_value_norms()

    @property
    def formats(self) -> Sequence[np.ndarray]:
        """Per KV head, int32 ``[n_slots[h]]``: how its slots are stored, as index into ``slot_bytes``."""
        if self.read_formats is None:
            return [np.zeros(n, np.int32) for n in self.n_slots]
        return self.read_formats()

    def release(self) -> None:
        """Forget the scores (they are the largest thing a view holds)."""
        self._scores = None


@dataclass
class CacheView:
    """All layers of one sequence, and the budget they share.

    Attributes:
        layers: one :class:`LayerView` per attention layer.
        budget: tokens to hold per KV head and layer, on average, window and sinks included.
    """

    layers: Sequence[LayerView]
    budget: int

    @property
    def n_layer(self) -> int:
        return len(self.layers)
