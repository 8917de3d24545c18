"""ChunkKV: chunks of neighbouring tokens that the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.params import whole
from kvlocal.policies.parts.allocated import Allocated
from kvlocal.policies.parts.scoring import Floats, Region, prefix_scores
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Allocated):
    """Keeps whole chunks of neighbouring tokens, those that the last window of queries attends to most.

    Paper: Liu et al., *ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference*,
    arXiv:2502.00299.

    Formula, per KV head with ``s[j]`` = SnapKV's window score without pooling, averaged over the group::

        S[j] = mean of s over the chunk of j

    A chunk is ``chunk`` competing slots of a head in a row, counted from the first one; the last chunk may be shorter,
    and its mean is over its own slots. All slots of a chunk score alike, so chunks are kept whole, best first; of the
    one that no longer fits the lower slots stay. ``chunk=1`` is SnapKV without pooling.

    Shapes: reads ``[n_head, n]`` scores per layer. Cost: O(n_head n) per layer.
    Limits: chunks are counted, they do not follow sentences, and after an eviction their borders lie elsewhere in the
    text. Every KV head chooses its own chunks, where kvpress has one choice for all heads of a layer; the paper's reuse
    of one layer's choice in the next is left out.
    """

    name: ClassVar[str] = "chunkkv"
    paper: ClassVar[str] = "ChunkKV, arXiv:2502.00299"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    window: int = whole(32, low=1, help="most recent tokens: always kept, and their queries rank the others")
    chunk: int = whole(16, low=1, help="neighbouring tokens that are kept together")

    @property
    def n_window(self) -> int:
        return self.window

    def scores(self, layer: LayerView, where: Region) -> Floats:
        scores = prefix_scores(layer, where, kernel=1, kind="none", agg="mean").astype(np.float64)
        for row, start, stop in zip(scores, where.start, where.stop, strict=True):
            row[start:stop] = chunk_means(row[start:stop], self.chunk)
        return scores


def chunk_means(values: Floats, chunk: int) -> Floats:
    """Every entry of a vector replaced by the mean of its chunk of ``chunk`` neighbours."""
    first = np.arange(0, len(values), chunk)
    if not len(first):
        return values
    lengths = np.diff(np.r_[first, len(values)])
    return np.repeat(np.add.reduceat(values, first) / lengths, lengths)
