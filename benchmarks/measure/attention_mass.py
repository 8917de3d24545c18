"""How much of the attention falls on what is read, by what stands for the units and by how late the choice is."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvlocal.engine.retrieving import Retrieving
from kvlocal.engine.sequence import Sequence, append
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.retrieval import make_retriever

N_TEXT, N_STEPS, PAGE = 4096, 32, 16
SINK, RECENT = 32, 64
BUDGETS = (128, 256, 512, 1024)


def measure(model: Model, text: list[int], threads: int) -> list[dict[str, Any]]:
    """Shares of attention, mean over the layers, query heads and the last steps of a text; every KV head chooses."""
    with Context(model, ContextConfig(N_TEXT + 64, n_threads=threads, n_window=64 + N_STEPS + 1)) as context:
        assert context.cache is not None
        sequence = Sequence(context, 0)
        for i in range(0, N_TEXT, 512):
            append({sequence: text[i : i + 512]}, outputs="none")
        retrieving = Retrieving(context, make_retriever("sentencekv"))
        retrieving.index(sequence)
        ends = {"sentences": sequence.units, "pages": list(range(PAGE, N_TEXT, PAGE))}
        sums: dict[tuple[str, int, int], list[float]] = {}
        for i, layer in enumerate(context.cache.layers):
            queries = context.cache.queries(0, i, 64 + N_STEPS + 1).astype(np.float64)
            for head in range(layer.n_head_kv):
                keys = context.cache.keys_values(0, i, head)[0].astype(np.float64)
                group = layer.n_head // layer.n_head_kv
                mine = queries[:, head * group : (head + 1) * group]
                for step in range(N_STEPS):
                    _one(sums, ends, keys, mine, N_TEXT - N_STEPS + step, layer.kq_scale)
    return [
        {"by": by, "lag": lag, "budget": budget, "share": float(np.mean(shares))}
        for (by, lag, budget), shares in sums.items()
    ]


def _one(
    sums: dict[tuple[str, int, int], list[float]],
    all_ends: dict[str, list[int]],
    keys: np.ndarray,
    queries: np.ndarray,
    at: int,
    scale: float,
) -> None:
    """The token at position ``at``: keys ``[n, d]``, queries ``[64 + steps + 1, group, d]`` that end with the text."""
    first = N_TEXT - len(queries)  # position of the first query
    logits = queries[at - first] @ keys[: at + 1].T * scale
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mass = p.mean(0)
    for kind, ends in all_ends.items():
        closed = [end for end in ends if end <= at]
        begins = [0, *closed[:-1]]
        open_begin = closed[-1] if closed else 0
        always = np.zeros(at + 1, bool)
        always[:SINK] = always[max(at + 1 - RECENT, 0) :] = always[open_begin:] = True
        # what is chosen from: the parts of units that are not read anyway
        free = [np.flatnonzero(~always[b:e]) + b for b, e in zip(begins, closed, strict=True)]
        sizes = np.array([len(slots) for slots in free])
        got = np.array([mass[slots].sum() for slots in free])
        whole = float(mass[always].sum())
        for lag in (0, 1):
            to = at - first + 1 - lag
            if kind == "sentences":
                asked = queries[max(open_begin - first, 0, to - 64) : to]
                if len(asked) < 2:
                    asked = queries[to - 32 : to]
                means = np.array([keys[b:e].mean(0) for b, e in zip(begins, closed, strict=True)])
                choices = {"mean key of sentences": means @ asked.mean(0).sum(0)}
            else:
                high = np.array([keys[b:e].max(0) for b, e in zip(begins, closed, strict=True)])
                low = np.array([keys[b:e].min(0) for b, e in zip(begins, closed, strict=True)])
                query = queries[to - 1]
                choices = {
                    "bounds of pages": np.maximum(query, 0).sum(0) @ high.T + np.minimum(query, 0).sum(0) @ low.T,
                    "mean key of pages": np.array([keys[b:e].mean(0) for b, e in zip(begins, closed, strict=True)])
                    @ query.sum(0),
                }
            if lag == 0:
                choices[f"the best {kind}"] = got / np.maximum(sizes, 1)
            for by, scores in choices.items():
                for budget in BUDGETS:
                    chosen = _take(scores, sizes, budget - SINK - RECENT)
                    sums.setdefault((by, lag, budget), []).append(whole + float(got[chosen].sum()))


def _take(scores: np.ndarray, sizes: np.ndarray, room: int) -> list[int]:
    out = []
    for unit in np.argsort(-scores, kind="stable"):
        if 0 < sizes[unit] <= room:
            out.append(int(unit))
            room -= int(sizes[unit])
        if room < 4:
            break
    return out
