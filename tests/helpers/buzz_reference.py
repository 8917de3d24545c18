"""Independent numpy models of BUZZ and the cascading cache, token by token, for comparison."""

from __future__ import annotations

import numpy as np


class Buzz:
    """One layer. ``pos`` and ``mass`` are ``[n_head_kv, n]``; every head holds as many slots, the oldest first."""

    def __init__(self, sink: int, window: int, stride: int, threshold: int) -> None:
        self.sink, self.window, self.stride, self.threshold = sink, window, stride, threshold
        self.n_old = 0
        self.pos = self.mass = np.empty((0, 0))

    def step(self, attention: np.ndarray, new: np.ndarray) -> bool:
        """``attention``: ``[n_head_kv, n_new, n_held + n_new]``, summed over the query heads of a KV head."""
        n_head_kv, n_new, _ = attention.shape
        received = attention.sum(1)
        new = np.tile(new, (n_head_kv, 1))
        if self.pos.size:
            received[:, :-n_new] += self.mass
            new = np.concatenate([self.pos, new], 1)
        self.mass, self.pos = received, new
        return self._evict()

    def _evict(self) -> bool:
        n_head_kv, n = self.pos.shape
        if n - self.sink - self.window <= self.threshold:
            return False
        old = np.arange(self.sink, self.sink + self.n_old, -(-self.stride // 2))
        begin, end = self.sink + self.n_old, n - self.window
        starts = range(begin, end, self.stride)
        keep = np.array(
            [
                [
                    *range(self.sink),
                    *old,
                    *(i + int(np.argmax(self.mass[h, i : min(i + self.stride, end)])) for i in starts),
                    *range(end, n),
                ]
                for h in range(n_head_kv)
            ]
        )
        self.pos = np.take_along_axis(self.pos, keep, 1)
        self.mass = np.take_along_axis(self.mass, keep, 1)
        self.mass[:, : self.sink + len(old)] = 0  # no later choice reads it: old slots go by their index
        self.n_old = len(old) + len(starts)
        return True


class Cascade:
    """One head of a cascading cache with rings of ``n_ring`` slots; a token's score never changes."""

    def __init__(self, n_ring: int, n_rings: int, n_sink: int) -> None:
        self.n_ring, self.n_sink, self.n_seen = n_ring, n_sink, 0
        self.sinks: list[int] = []
        self.rings: list[list[tuple[int, float]]] = [[] for _ in range(n_rings)]

    def insert(self, pos: int, score: float) -> None:
        self.n_seen += 1
        if len(self.sinks) < self.n_sink:
            self.sinks.append(pos)
            return
        filling = self.n_seen - 1 <= self.n_ring * len(self.rings) + self.n_sink
        token = (pos, score)
        for i, ring in enumerate(self.rings):
            if filling or (self.n_seen - 1 - self.n_sink) % 2**i == 0:
                ring.append(token)
                if len(ring) <= self.n_ring:
                    return
                token = ring.pop(0)
                continue
            if not ring:
                ring.append(token)
            elif token[1] >= ring[-1][1]:
                ring[-1] = token
            return

    def order(self) -> list[int]:
        return self.sinks + [pos for ring in reversed(self.rings) for pos, _ in ring]
