"""SnapKV: the prompt tokens that the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.params import choice, whole
from kvlocal.policies.parts.ranked import Ranked
from kvlocal.policies.parts.scoring import Floats, Region, prefix_scores
from kvlocal.policies.parts.view import LayerView


@dataclass(frozen=True, kw_only=True)
class SnapKV(Ranked):
    """Keeps the tokens that the last window of queries attends to, the same number in every head.

    Paper: Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation*, arXiv:2404.14469.

    Formula, per KV head with ``p`` competing slots (neither sink nor window)::

        s[q, j] = mean over the window rows of softmax(Q K^T / sqrt(d))[row, j]      q: query head
        S[h]    = pool(mean over q in group(h) of s[q])                              over the head's own slots
        keep[h] = sinks + top-b(S[h]) + window,   b = budget - window - sink

    Equal scores: the lower slot wins. Heads that hold fewer slots than the budget leave the rest to the other heads
    of the layer; a layer that holds no more than its budget keeps everything.

    Shapes: reads ``[n_head, n]`` scores per layer, pools ``[H, n]``. Cost: O(n_head n + kernel H n) per layer.
    Limits: the ranking knows only the question that stands in the window; a later, different question may need what
    was evicted.

    ``compat="kvpress"`` pools every query head before averaging the group (kvpress itself runs with ``window=64
    kernel=5 pool=avg``, where the order makes no difference); ``compat="adakv"`` changes nothing here.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv:2404.14469"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    window: int = whole(32, low=1, help="most recent tokens: always kept, and their queries rank the others")
    kernel: int = whole(7, low=1, odd=True, help="width of the pooling over neighbouring tokens")
    pool: str = choice("max", ["max", "avg", "none"], help="how neighbouring scores are pooled")
    agg: str = choice("mean", ["mean", "max"], help="how the query heads of one KV head are combined")
    compat: str | None = choice(None, [None, "adakv", "kvpress"], help="follow this implementation to the letter")

    @property
    def n_window(self) -> int:
        return self.window

    def scores(self, layer: LayerView, where: Region) -> Floats:
        return prefix_scores(
            layer, where, kernel=self.kernel, kind=self.pool, agg=self.agg, pool_first=self.compat == "kvpress"
        )
