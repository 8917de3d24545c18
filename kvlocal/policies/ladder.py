"""Ladder: one price per byte decides how every token of every head is stored, and which are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.errors import UsageError
from kvlocal.native.formats import PAGE_SLOTS
from kvlocal.params import choice, real, subset, validate, whole
from kvlocal.policies.parts.policy import Decision, Policy
from kvlocal.policies.parts.rungs import GONE, Pages, climb
from kvlocal.policies.parts.scoring import Floats, Ints, Region, prefix_scores, region
from kvlocal.policies.parts.view import CacheView, LayerView

ERRORS = {"f16": 0.0, "q8": 0.003, "q4": 0.03, "kv3": 0.12, "kv2": 0.20}
"""The rungs, and the relative error that each adds to a token's part of the attention output; dropping it adds 1."""


@dataclass
class Head:
    """The competing slots of one head, grouped into pages.

    Attributes:
        rungs: int64 ``[n]``: the rung of every slot now.
        pages: slots of each page, best page first; the slots of a page share a rung.
        weights: float64, sum of the slots' weights per page.
        bytes: of the f16 pages that sinks, window and the slots that fill these pages take.
        slot_bytes: bytes of a slot per rung.
    """

    rungs: Ints
    pages: list[Ints]
    weights: Floats
    bytes: float
    slot_bytes: list[float]


@dataclass(frozen=True, kw_only=True)
class Ladder(Policy):
    """Stores every token of every head as precisely as its importance pays for, at one price for the whole model.

    Source: kvlocal. One rule decides what is dropped (as SnapKV and Ada-KV do) and what is stored in few bits (as KIVI
    and LogQuant do): f16, q8, q4, kv3, kv2, gone. Related: RDKV, arXiv:2605.08317; ARKV, arXiv:2603.08727; MixedDimKV,
    arXiv:2603.20616.

    Formula, per layer, KV head and slot ``j`` between sinks and window::

        m    = root mean square over the last queries of softmax(Q K^T / sqrt(d))[row]
        s    = max over the group's query heads of m
        w[j] = ((max of s within kernel // 2 tokens of j) * |v[j]|) ^ power
        rung = argmin over r of  w[j] * error[r] + price * bytes[r]

    with the price at which the bytes meet the budget. Dropping a token of attention ``a`` moves a head's output by at
    most ``2 C a``, storing it with relative error ``e`` by at most ``C a e``, so one multiplier minimises the sum of
    these bounds. The last queries only estimate the attention to come: their pooling and the power are for that, and
    the squares let a token stand out that a few of them, such as a question's, look at hard. The pooling reaches about
    a sentence: attention falls on a few words of a fact, and the fact is more than these.
    Pages hold one rung each, so slots compete by pages of 32: a head's slots in the order of ``w``, within what they
    are stored as now. Pages of sinks and window are f16; where these do not fill theirs, the best slots do.

    Precision only falls: what was demoted stays on its rung or goes lower. The budget is in bytes of whole pages (a
    budget of tokens means the bytes that so many f16 tokens take), so more tokens are held than it names. A
    growing sequence is evicted again once it exceeds the budget by a sixteenth, or by ``evict_every`` if that is more.

    ``rungs=f16 price=layer alpha=0 norm=no power=1`` is purely adaptive Ada-KV on pages of slots, by these scores.

    Shapes: reads ``[n_head, n]`` scores per layer and the values. Cost: O(n log n) per head, and one sort of all pages.
    Limits: the ranking knows only the question that stands in the window. Rungs that the cache cannot store (heads of
    another size than a multiple of 64, or 32 for q8 and q4; pages on an accelerator) are left out.
    """

    name: ClassVar[str] = "ladder"
    paper: ClassVar[str] = "kvlocal"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    window: int = whole(28, low=1, help="most recent tokens: always f16; with the sinks, one page")
    queries: int = whole(64, low=1, help="most recent queries that rank the tokens")
    sink: int = whole(4, low=0, help="tokens at the start of the sequence that are always f16")
    rungs: str = subset(",".join(ERRORS), list(ERRORS), help="how tokens may be stored (f16 always is one)")
    price: str = choice("model", ["model", "layer"], help="whether all layers pay one price, or each its own")
    alpha: float = real(0.2, low=0, high=1, help="share of its equal part of the bytes that every head is sure of")
    mean: str = choice("square", ["square", "plain"], help="of a token's attention over the queries")
    power: float = real(0.7, low=0, high=2, help="exponent of the scores: below 1 they count less")
    norm: str = choice("yes", ["yes", "no"], help="whether a score is multiplied with the norm of the value")
    kernel: int = whole(21, low=1, odd=True, help="width of the pooling over neighbouring tokens")
    pool: str = choice("max", ["max", "avg"], help="how neighbouring scores are pooled")
    agg: str = choice("max", ["max", "mean"], help="how the query heads of one KV head are combined")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def n_window(self) -> int:
        return max(self.queries, self.window)

    @property
    def rms(self) -> bool:
        return self.mean == "square"

    @property
    def min_budget(self) -> int:
        return -(-(self.sink + self.window) // PAGE_SLOTS) * PAGE_SLOTS

    def limit(self, budget: int, evict_every: int) -> int:
        # checking a long cache costs more than a page of room
        return budget + max(evict_every, budget // 16) - 1

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(name for name in ERRORS if name in self.rungs.split(",") and name != "f16")

    def decide(self, view: CacheView) -> Iterator[Decision]:
        if view.budget < self.min_budget:
            raise UsageError(
                f"policy {self.name} needs a budget of at least {self.min_budget} tokens per head "
                f"(the pages of sinks and window), but was given {view.budget}."
            )
        names = [name for name in ("f16", *self.formats) if all(name in layer.slot_bytes for layer in view.layers)]
        layers = [self._heads(layer, names) for layer in view.layers]
        together = [range(len(layers))] if self.price == "model" else [range(i, i + 1) for i in range(len(layers))]
        for some in together:
            heads = [head for i in some for head in layers[i]]
            share = [view.budget * head.slot_bytes[0] for head in heads]
            room = [(view.layers[i].n_room, view.layers[i].n_free) for i in some]
            cap = max(room)[0] // PAGE_SLOTS
            self._choose(heads, np.array(share), [ERRORS[name] for name in names], cap)
            if cap:
                self._leave_room(heads, max(n_room - n_free for n_room, n_free in room), names)
        for layer, of_layer in zip(view.layers, layers, strict=True):
            yield self._decision(layer, of_layer, names)

    def weights(self, layer: LayerView, where: Region) -> Floats:
        """Importance of the competing slots, float64 ``[H, n]``, -inf elsewhere."""
        scores = prefix_scores(layer, where, kernel=self.kernel, kind=self.pool, agg=self.agg).astype(np.float64)
        for h, norms in enumerate(layer.value_norms if self.norm == "yes" else ()):
            scores[h, where.start[h] : where.stop[h]] *= norms[where.start[h] : where.stop[h]]
        competes = np.isfinite(scores)
        scores[competes] **= self.power
        return scores

    def _heads(self, layer: LayerView, names: list[str]) -> list[Head]:
        where = region(layer, self.sink, self.window)
        weights = self.weights(layer, where)
        layer.release()
        # the rung of each format that the cache can store; of one that is no rung, the next lower
        formats = list(layer.slot_bytes)
        rung_of = np.searchsorted([formats.index(name) for name in names], np.arange(len(formats)))
        slot_bytes = [layer.slot_bytes[name] for name in names]
        out = []
        for h, held in enumerate(layer.formats):
            rungs = rung_of.clip(max=len(names) - 1)[held]
            w = weights[h, : len(rungs)]
            competes = np.isfinite(w)
            n_always = int((~competes & (rungs == 0)).sum())
            n_free = -n_always % PAGE_SLOTS
            pages: list[Ints] = []
            sums: list[Floats] = []
            for rung in range(len(names)):
                slots = np.flatnonzero(competes & (rungs == rung))
                slots = slots[np.argsort(-w[slots], kind="stable")]
                if rung == 0:
                    n_always += len(slots[:n_free])
                    slots = slots[n_free:]
                starts = np.arange(0, len(slots), PAGE_SLOTS)
                pages += [slots[i : i + PAGE_SLOTS] for i in starts]
                sums.append(np.add.reduceat(w[slots], starts) if len(slots) else np.empty(0))
            page_weights = np.concatenate(sums)
            order = np.argsort(-page_weights, kind="stable")
            always_bytes = -(-n_always // PAGE_SLOTS) * PAGE_SLOTS * slot_bytes[0]
            out.append(Head(rungs, [pages[i] for i in order], page_weights[order], always_bytes, slot_bytes))
        return out

    def _choose(self, heads: Sequence[Head], share: Floats, errors: Sequence[float], cap: int) -> None:
        """Sets the rungs of the competing slots of heads that pay one price; ``share``: bytes if all had the same."""
        counts = [len(head.pages) for head in heads]
        head_of = np.repeat(np.arange(len(heads)), counts)
        rank = np.concatenate([np.arange(n) for n in counts])
        pages = Pages(
            weight=np.concatenate([head.weights for head in heads]),
            ceiling=np.array([head.rungs[slots[0]] for head in heads for slots in head.pages], np.int64),
            head=head_of,
            rank=rank,
        )
        always = np.array([head.bytes for head in heads])
        costs = [[PAGE_SLOTS * b for b in head.slot_bytes] for head in heads]
        chosen = climb(pages, costs, errors, share.sum() - always.sum(), (self.alpha * share - always).clip(0))
        if cap:
            chosen[rank >= cap] = GONE
        for i, slots in enumerate(slots for head in heads for slots in head.pages):
            heads[head_of[i]].rungs[slots] = chosen[i]

    def _leave_room(self, heads: Sequence[Head], n_f16: int, names: Sequence[str]) -> None:
        """What a head has in f16 beyond so many slots goes to the next rung, the least important first: the f16 pages
        of the cache must have room for the tokens to come."""
        below = 1 if len(names) > 1 else GONE
        for head in heads:
            n_always = round(head.bytes / (PAGE_SLOTS * head.slot_bytes[0]))
            best = [slots for slots in head.pages if head.rungs[slots[0]] == 0]
            for slots in best[max(n_f16 // PAGE_SLOTS - n_always, 0) :]:
                head.rungs[slots] = below

    def _decision(self, layer: LayerView, heads: Sequence[Head], names: Sequence[str]) -> Decision:
        keep = [np.flatnonzero(head.rungs != GONE) for head in heads]
        demote = {
            name: [np.flatnonzero(head.rungs[kept] == rung) for head, kept in zip(heads, keep, strict=True)]
            for rung, name in enumerate(names)
            if rung > 0
        }
        return Decision(keep, demote, (self.sink, layer.n_seen - self.window))
