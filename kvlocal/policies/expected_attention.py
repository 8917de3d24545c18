"""Expected attention: tokens that queries yet to come will look at, if they are like the last ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.errors import KVError
from kvlocal.params import choice, real, whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, competing, per_head
from kvlocal.policies.parts.view import LayerView

Rotate = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Allocated):
    """Keeps the tokens that future queries are expected to attend to, judged by the mean and spread of recent ones.

    Paper: Devoto et al., *Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution*, arXiv:2510.00636.

    Formula, per query head with mean ``mu`` and covariance ``C`` (divided by their number) of its last queries before
    RoPE, those at positions below ``sink`` left out; ``R`` = mean of the rotations by ``n_seen .. n_seen + n_future -
    1`` (a mean, so it shortens what turns fast), ``s`` = what logits are multiplied with, ``k`` = keys after RoPE::

        z[j] = s k_j . R mu  +  s^2 / 2  k_j . R C R^T k_j         (log of E[exp(s k_j . q)] for normal queries q)
        a    = mean over the group's query heads of softmax(z) over the slots at positions >= sink
        S[j] = (a[j] + epsilon) ||v_j||

    ``covariance=no`` leaves out the second term, ``vnorm=no`` the norm. kvpress, which this follows, combines it with
    ``allocation=ada epsilon=0.01`` in its benchmarks.

    Shapes: reads ``[queries, n_head, d_k]`` queries per layer, keys and values ``[n, d_k]``, ``[n, d_v]`` head by head;
    never ``[n, n]``. Cost: O(n_head n d_k^2) per layer and eviction, nothing between them.
    Limits: the statistics are those of the last ``queries`` queries, where the paper takes the whole prompt's: what is
    remembered costs ``queries * n_head * d_k * 4`` bytes per layer and sequence, however long the text. A change of
    subject is seen only once it has come.
    """

    name: ClassVar[str] = "expected-attention"
    paper: ClassVar[str] = "Expected Attention, arXiv:2510.00636"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = whole(0, low=0, help="most recent tokens that are always kept")
    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always kept")
    queries: int = whole(256, low=2, help="most recent queries whose mean and covariance are taken")
    n_future: int = whole(512, low=1, help="positions to come over which the rotation is averaged")
    covariance: str = choice("yes", ["yes", "no"], help="whether the spread of the queries counts")
    vnorm: str = choice("yes", ["yes", "no"], help="whether the attention is weighted with the norm of the value")
    epsilon: float = real(0.0, low=0, high=1, help="added to the attention, so that large values count everywhere")

    @property
    def n_window(self) -> int:
        return self.queries

    def scores(self, layer: LayerView, where: Region) -> Floats:
        if layer.read_queries is None or layer.rotate is None:
            raise ValueError("this view carries no queries; set `needs = {'queries'}` on the policy")
        queries = self._unrotated(layer, layer.read_queries(), layer.rotate)
        turn = mean_rotation(layer.rotate, queries.shape[-1], layer.n_seen, self.n_future)
        group = layer.n_head // layer.n_head_kv

        def score(head: int) -> Floats:
            keys, values = layer.keys_values(head)
            first = int(np.searchsorted(layer.positions[head], self.sink))
            attention = np.zeros(len(keys))
            for q in range(head * group, (head + 1) * group if first < len(keys) else 0):
                attention[first:] += softmax(self._logits(keys[first:], queries[:, q], turn, layer.kq_scale)) / group
            return (attention + self.epsilon) * np.linalg.norm(values, axis=1) if self.vnorm == "yes" else attention

        return competing(per_head(layer, score), where)

    def _unrotated(self, layer: LayerView, queries: np.ndarray, rotate: Rotate) -> Floats:
        """The queries that count, before RoPE, float64 ``[n, n_head, d_k]``."""
        if not len(queries):
            raise KVError(f"layer {layer.layer}: no queries are remembered, so none can be expected.")
        n, n_head, d = queries.shape
        at = np.arange(layer.n_seen - n, layer.n_seen)
        if (at >= self.sink).any():
            queries, at = queries[at >= self.sink], at[at >= self.sink]
        turns = np.repeat(-at, n_head).astype(np.int32)
        return rotate(queries.reshape(-1, d), turns).reshape(-1, n_head, d).astype(np.float64)

    def _logits(self, keys: Floats, queries: Floats, turn: Floats, scale: float) -> Floats:
        """``z`` of one query head for keys ``[n, d]``, from its queries ``[m, d]``."""
        mean = queries.mean(axis=0)
        logits = keys @ (turn @ mean * scale).astype(keys.dtype)
        if self.covariance == "yes":
            spread = (queries - mean) @ turn.T * scale
            covariance = (spread.T @ spread / (2 * len(spread))).astype(keys.dtype)
            logits += np.einsum("nd,nd->n", keys @ covariance, keys)
        return logits.astype(np.float64)


def mean_rotation(rotate: Rotate, d: int, first: int, n: int) -> Floats:
    """Mean over the positions ``first .. first + n - 1`` of the matrix that turns a vector there, ``[d, d]``.

    Turning by a and then by b is turning by a + b, so the sum over twice as many positions is the sum and the sum
    turned: ``d`` rows are rotated some ``2 log2(n)`` times, instead of ``d n`` once.
    """

    def turned(rows: Floats, by: int) -> Floats:
        return rotate(rows.astype(np.float32), np.full(d, by, np.int32)).astype(np.float64)

    # row j: where unit vector j goes, summed over the positions 0 .. done - 1
    rows, done = np.eye(d), 1
    for digit in bin(n)[3:]:
        rows, done = rows + turned(rows, done), 2 * done
        if digit == "1":
            rows, done = rows + turned(np.eye(d), done), done + 1
    return turned(rows / n, first).T


def softmax(logits: Floats) -> Floats:
    """Of one vector with at least one entry."""
    p = np.exp(logits - logits.max())
    return p / p.sum()
