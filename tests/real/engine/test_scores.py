"""Scores and selections on a real model and real text, against numpy and an independent model of the policies.

The text is read once. Every policy then evicts a branch of it, through the hook that the engine uses, at the end of a
decode step that has attended to everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ada_reference as reference
import numpy as np
import pytest

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import append
from kvlocal.native.cache import PagedCache
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

N_TOKENS = 700
WINDOW, KERNEL, ALPHA, BETA = 32, 7, 0.2, 20
BUDGET = N_TOKENS // 4
PREFIX = N_TOKENS - WINDOW
POLICIES = ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"]

Floats = np.ndarray


class Run:
    """A text in sequence 0, whole, and one branch per policy, evicted to a quarter; logits after the last token."""

    def __init__(self, engine: Engine, tokens: list[int]) -> None:
        assert engine.cache is not None
        self.cache: PagedCache = engine.cache
        self.n_layer = len(self.cache.layers)
        self.n_head_kv = self.cache.layers[0].n_head_kv
        self.logits: dict[str, Floats] = {}
        self.seq = {name: 1 + i for i, name in enumerate(POLICIES)}
        engine.prefill(tokens[:-1])  # with a budget of 100 % the engine itself evicts nothing

        for name, seq in self.seq.items():
            branch = engine.sequences[seq]
            engine.sequences[0].branch(branch)
            append({branch: tokens[-1:]})
            self.logits[name] = engine.context.logits()[0]
            evict(branch, make_policy(name), BUDGET)
        engine.context.decode(tokens[-1:], N_TOKENS - 1, 0)
        self.logits["full"] = engine.context.logits()[0]
        self.scores = [self.cache.window_scores(0, layer) for layer in range(self.n_layer)]

    def kept(self, policy: str, layer: int) -> list[list[int]]:
        """Positions per KV head."""
        return [held.tolist() for held in self.cache.positions(self.seq[policy], layer)]

    def pooled(self, layer: int) -> Floats:
        """Scores of the prefix per KV head, by the reference."""
        grouped = reference.reduce_groups(self.scores[layer][:, :PREFIX], self.n_head_kv, "mean")
        scores: Floats = reference.pool1d(grouped, KERNEL, "maxpool")
        return scores


@pytest.fixture(scope="module")
def run(default_path: Path, log_text: str) -> Iterator[Run]:
    config = EngineConfig(
        default_path, make_policy("snapkv"), Budget.parse("100%"), n_threads=1, n_ctx=1024, n_seq_max=5
    )
    with Engine(config) as engine:
        # from a paragraph's beginning in the middle of the document
        middle = log_text[log_text.index("\n\n", len(log_text) // 3) :]
        yield Run(engine, engine.tokenize(middle.strip())[:N_TOKENS])


#
# scores
#


@pytest.mark.parametrize("layer", [0, 7, 15, 29])
def test_window_scores_equal_numpy(layer: int, run: Run) -> None:
    """From the stored queries and keys, in float64: softmax over all slots, causal in the window, mean over it."""
    shape = run.cache.layers[layer]
    queries = run.cache.queries(0, layer, WINDOW).astype(np.float64)
    assert queries.shape == (WINDOW, shape.n_head, shape.d_k)
    got = run.scores[layer]
    assert got.shape == (shape.n_head, N_TOKENS)
    rows = np.arange(PREFIX, N_TOKENS)
    for head in range(shape.n_head):
        keys, _ = run.cache.keys_values(0, layer, head // (shape.n_head // shape.n_head_kv))
        logits = queries[:, head] @ keys.astype(np.float64).T / np.sqrt(shape.d_k)
        logits[np.arange(N_TOKENS)[None] > rows[:, None]] = -np.inf
        attention = np.exp(logits - logits.max(1, keepdims=True))
        attention /= attention.sum(1, keepdims=True)
        np.testing.assert_allclose(got[head], attention.mean(0), rtol=1e-3, atol=1e-9)
        assert got[head].sum() == pytest.approx(1, abs=1e-4)


def test_the_scores_are_worth_a_selection(run: Run) -> None:
    """Not flat, and different from head to head: else the comparisons below would show little."""
    top = [np.sort(scores[:, :PREFIX], axis=1)[:, -BUDGET:].sum() / scores[:, :PREFIX].sum() for scores in run.scores]
    assert np.mean(top) > 0.5
    held = np.array([[len(head) for head in run.kept("ada-snapkv", layer)] for layer in range(run.n_layer)])
    assert held.min() < 0.6 * BUDGET and held.max() > 1.4 * BUDGET


@pytest.mark.parametrize("policy", POLICIES)
def test_the_evicting_step_saw_everything(policy: str, run: Run) -> None:
    """The first generated token is that of the full cache, and so is every other logit."""
    np.testing.assert_array_equal(run.logits[policy], run.logits["full"])


#
# selections
#


def check(kept: list[list[int]], scores: Floats, counts: list[int]) -> None:
    """Every head holds its best ``counts[h]`` of the prefix (the lower slot among equals) and the window."""
    for head, (row, count) in enumerate(zip(scores, counts, strict=True)):
        best = sorted(reference.topk_idx(row, count).tolist())
        assert kept[head] == [*best, *range(PREFIX, N_TOKENS)]


def ada_counts(scores: Floats, per_head: int) -> list[int]:
    """The reference's counts with the tie rule of Ada-SnapKV: score, then rank inside the head, then head.

    The reference takes ties in the order of the flat array, and max pooling makes ties the norm: it gets the scores'
    places in that order instead of the scores. Shares are rounded to what is exact in binary: equal fractions, which
    are common with a share of 0.2, have to be equal for it too.
    """
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    head = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape)
    order = np.lexsort((head.ravel(), rank.ravel(), -scores.ravel()))
    places = np.empty(scores.size)
    places[order] = -np.arange(scores.size)
    adaptive = reference.ada_counts(places.reshape(scores.shape), per_head)
    shares = np.round(((1 - ALPHA) * adaptive + ALPHA * per_head) * 1024) / 1024
    counts: list[int] = reference.largest_remainder(shares, len(scores) * per_head).tolist()
    return counts


def layer_budgets(run: Run, policy: str) -> list[int]:
    """Prefix slots per head and layer, on average, as kept: exact in total, a pyramid to within rounding."""
    n_head_kv = run.n_head_kv
    totals = np.array([sum(map(len, run.kept(policy, layer))) for layer in range(run.n_layer)])
    assert totals.sum() == run.n_layer * n_head_kv * BUDGET
    assert (totals % n_head_kv == 0).all()
    per_head = totals // n_head_kv - WINDOW
    low = (BUDGET - WINDOW) / BETA
    progression = np.linspace(2 * (BUDGET - WINDOW) - low, low, run.n_layer)
    assert (np.abs(per_head - progression) < 1).all()
    assert (np.diff(per_head) <= 0).all()
    budgets: list[int] = per_head.tolist()
    return budgets


def test_snapkv_keeps_what_the_reference_keeps(run: Run) -> None:
    for layer in range(run.n_layer):
        scores = run.pooled(layer)
        check(run.kept("snapkv", layer), scores, [BUDGET - WINDOW] * run.n_head_kv)


def test_pyramidkv_keeps_what_the_reference_keeps(run: Run) -> None:
    """The reference's pyramid takes integer steps and misses the total; its selection inside a layer is the same."""
    budgets = layer_budgets(run, "pyramidkv")
    integer = reference.pyramid(BUDGET, WINDOW, BETA, run.n_layer, N_TOKENS)
    assert (np.abs(np.array(budgets) - integer) < run.n_layer).all()
    for layer, per_head in enumerate(budgets):
        check(run.kept("pyramidkv", layer), run.pooled(layer), [per_head] * run.n_head_kv)


def test_ada_snapkv_keeps_what_the_reference_keeps(run: Run) -> None:
    for layer in range(run.n_layer):
        scores = run.pooled(layer)
        counts = ada_counts(scores, BUDGET - WINDOW)
        kept = run.kept("ada-snapkv", layer)
        check(kept, scores, counts)
        # with the reference's own order of ties: as many slots in total, and to within the ties the same
        exact = reference.ada_budget_exact(scores, BUDGET - WINDOW, ALPHA)
        assert sum(map(len, kept)) - WINDOW * run.n_head_kv == exact.sum()
        assert np.abs(np.array(counts) - exact).max() <= KERNEL


def test_ada_pyramid_keeps_what_the_reference_keeps(run: Run) -> None:
    budgets = layer_budgets(run, "ada-pyramid")
    assert budgets == layer_budgets(run, "pyramidkv"), "Ada moves slots inside a layer only"
    for layer, per_head in enumerate(budgets):
        scores = run.pooled(layer)
        check(run.kept("ada-pyramid", layer), scores, ada_counts(scores, per_head))
