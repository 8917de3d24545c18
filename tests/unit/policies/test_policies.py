"""Whole policies: worked examples, and the invariants that every policy keeps on every cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view, random_layer, with_window

from kvlocal.errors import UsageError
from kvlocal.params import declared_rules
from kvlocal.policies import REGISTRY, make_policy

SEEDS = st.integers(0, 2**32 - 1)
SCORED = ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"]
ALLOCATED = ["observed", "expected-attention", "chunkkv", "keydiff", "knorm", "random"]
EVICTING = [name for name in REGISTRY if name not in ("full", "buzz", "ladder")]
"""What holds a budget of tokens; the size of buzz swings (test_buzz.py), the ladder counts bytes (test_ladder.py)."""
TWO = [[0.90, 0.03, 0.02, 0.01, 0.02, 0.02], [0.20, 0.18, 0.17, 0.16, 0.15, 0.14]]


def kept_of(name: str, args: dict, scores: np.ndarray, budget: int, n_head_kv: int | None = None) -> list[list[int]]:
    """Slots kept in a single layer."""
    _, kept = evict(make_policy(name, args), cache_view(budget, layer_view(scores, n_head_kv)))
    return [slots.tolist() for slots in kept[0]]


def every_variant(name: str) -> list[dict]:
    if name in ALLOCATED:
        return [{"allocation": kind} for kind in ("uniform", "pyramid", "ada", "ada-pyramid")]
    if name == "tova":
        return [{"newest": "keep"}]
    base = [{}, {"compat": "kvpress"}] if name in SCORED else [{}]
    return base + ([{"safeguard": "protect"}] if "ada" in name else [])


def fitting(policy: str, **args: object) -> dict:
    """Those of the arguments that the policy has."""
    return {key: value for key, value in args.items() if key in declared_rules(REGISTRY[policy])}


EXACT = [
    (name, args) for name in EVICTING for args in every_variant(name) if "pyramid" not in name or "compat" not in args
]
DRIFTING = [("pyramidkv", {"compat": "kvpress"}), ("ada-pyramid", {"compat": "kvpress"})]
DRIFTING += [(name, {"compat": "adakv"}) for name in SCORED[1:]]


# Worked examples


@pytest.mark.parametrize(
    ("pool", "budget", "expected"),
    [("none", 4, [1, 4, 6, 7]), ("avg", 4, [1, 2, 6, 7]), ("avg", 5, [0, 1, 2, 6, 7]), ("max", 5, [0, 1, 2, 6, 7])],
)
def test_snapkv_example(pool, budget, expected):
    scores = with_window(np.array([[1, 4, 1, 1, 2, 1]]) * 7 / 96, 2)
    args = {"window": 2, "kernel": 3, "pool": pool}
    assert kept_of("snapkv", args, scores, budget) == [expected]
    assert kept_of("ada-snapkv", args, scores, budget) == [expected]


@pytest.mark.parametrize(("agg", "expected"), [("mean", [0, 2, 4]), ("max", [0, 1, 4])])
def test_group_example(agg, expected):
    scores = with_window([[0.60, 0.10, 0.25, 0.05], [0.02, 0.38, 0.35, 0.25]], 1)
    args = {"window": 1, "pool": "none", "agg": agg}
    assert kept_of("snapkv", args, scores, 3, n_head_kv=1) == [expected]


def test_one_kv_head_per_query_head():
    scores = with_window([[0.60, 0.10, 0.25, 0.05], [0.02, 0.38, 0.35, 0.25]], 1)
    assert kept_of("snapkv", {"window": 1, "pool": "none"}, scores, 3) == [[0, 2, 4], [1, 2, 4]]


@pytest.mark.parametrize(("compat", "expected"), [("none", [0, 1, 6]), ("kvpress", [1, 3, 6])])
def test_pooling_order_example(compat, expected):
    scores = with_window([[0.50, 0.10, 0.10, 0.05, 0.20, 0.05], [0.05, 0.05, 0.40, 0.30, 0.10, 0.10]], 1)
    args = {"window": 1, "kernel": 3, "compat": compat}
    assert kept_of("snapkv", args, scores, 3, n_head_kv=1) == [expected]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"alpha": 0.0}, [3, 7]),
        ({"alpha": 0.2}, [3, 7]),
        ({"alpha": 1.0}, [5, 5]),
        ({"alpha": 0.2, "safeguard": "protect"}, [3, 7]),
        ({"alpha": 0.7, "safeguard": "protect"}, [4, 6]),
        ({"alpha": 0.2, "compat": "adakv"}, [3, 6]),
        ({"alpha": 0.2, "compat": "kvpress"}, [3, 7]),
        ({"alpha": 0.8, "compat": "kvpress"}, [4, 6]),
        ({"alpha": 1.0, "compat": "kvpress"}, [5, 5]),
    ],
)
def test_ada_example(args, expected):
    policy = make_policy("ada-snapkv", {"window": 2, "pool": "none", **args})
    budgets, kept = evict(policy, cache_view(5, layer_view(with_window(TWO, 2))))
    assert budgets.tolist() == [expected]
    assert [len(slots) for slots in kept[0]] == expected


def test_ada_example_slots():
    args = {"window": 2, "pool": "none", "compat": "kvpress"}
    assert kept_of("ada-snapkv", args, with_window(TWO, 2), 5) == [[0, 6, 7], [0, 1, 2, 3, 4, 6, 7]]


def layers_of(name: str, args: dict, n: int, budget: int, n_layer: int = 4, n_head: int = 2) -> list[int]:
    """Slots per layer of a fresh prompt of ``n`` tokens."""
    rng = np.random.default_rng(n)
    view = cache_view(budget, *[layer_view(rng.random((n_head, n))) for _ in range(n_layer)])
    return make_policy(name, args).allocate(view).sum(axis=1).tolist()


@pytest.mark.parametrize(
    ("n", "compat", "rows"),
    [(200, "none", [32, 24, 16, 8]), (31, "none", [31, 24, 16, 9]), (31, "adakv", [31, 24, 17, 10])],
)
def test_pyramid_example(n, compat, rows):
    args = {"window": 4, "beta": 4, "compat": compat}
    assert layers_of("pyramidkv", args, n, 20) == [2 * r for r in rows]


def test_ada_pyramid_moves_slots_inside_layers_only():
    assert layers_of("ada-pyramid", {"window": 4, "beta": 4}, 200, 20) == [2 * r for r in [32, 24, 16, 8]]


def test_pyramid_example_counts_the_sinks():
    assert layers_of("pyramidkv", {"window": 3, "sink": 1, "beta": 4}, 200, 20) == [2 * r for r in [32, 24, 16, 8]]


def test_pyramid_keeps_its_shape_when_evicted_again():
    rng = np.random.default_rng(0)
    policy = make_policy("pyramidkv", {"window": 4, "beta": 4})
    held = [[np.arange(200)] * 2] * 4
    for n_seen in (200, 210, 220):
        views = [layer_view(rng.random((2, len(p[0]))), 2, p, n_seen, layer) for layer, p in enumerate(held)]
        budgets, kept = evict(policy, cache_view(20, *views))
        assert budgets.tolist() == [[r, r] for r in [32, 24, 16, 8]]
        new = np.arange(n_seen, n_seen + 10)
        held = [[np.r_[p[s], new] for p, s in zip(*both, strict=True)] for both in zip(held, kept, strict=True)]


def test_upstream_rounding_respects_short_heads():
    short, long = np.r_[5, 98:100], np.arange(100)
    view = cache_view(22, layer_view(np.ones((2, 100)) / 100, 2, [short, long]))
    policy = make_policy("ada-snapkv", {"window": 2, "alpha": 0.9, "compat": "adakv"})
    assert policy.allocate(view).tolist() == [[3, 24]]


def test_kvpress_pyramid_uses_its_own_budgets():
    assert layers_of("pyramidkv", {"window": 4, "beta": 4, "compat": "kvpress"}, 200, 20) == [70, 50, 30, 10]
    assert layers_of("pyramidkv", {"window": 4, "beta": 4, "compat": "kvpress"}, 31, 20) == [54, 44, 36, 26]
    assert layers_of("pyramidkv", {"window": 8, "beta": 4, "compat": "kvpress"}, 200, 20) == [40, 40, 40, 40]


def test_streaming_example():
    assert kept_of("streaming", {"sink": 2}, np.zeros((1, 10)), 5) == [[0, 1, 7, 8, 9]]


def test_full_keeps_everything():
    view = cache_view(1, random_layer(np.random.default_rng(0), 3, 1, 20))
    budgets, kept = evict(make_policy("full"), view)
    assert budgets.tolist() == [view.layers[0].n_slots.tolist()]
    assert [len(slots) for slots in kept[0]] == budgets[0].tolist()


# Invariants


def check_invariants(policy, view) -> list[list[np.ndarray]]:
    budgets, kept = evict(policy, view)
    assert budgets.dtype == np.int64 and budgets.shape == (view.n_layer, view.layers[0].n_head_kv)
    sink, window = getattr(policy, "sink", 0), getattr(policy, "window", 0)
    for layer, counts, slots in zip(view.layers, budgets, kept, strict=True):
        held = layer.n_slots
        assert (counts <= held).all() and (counts >= 1).all()
        for p, count, s in zip(layer.positions, counts, slots, strict=True):
            assert s.dtype == np.int64 and len(s) == count
            assert (np.diff(s) > 0).all() and s[0] >= 0 and s[-1] < len(p)
            assert p[s[-1]] == p[-1]
            assert set(np.flatnonzero((p < sink) | (p >= layer.n_seen - window))) <= set(s)
    return kept


def check_totals(policy, view) -> None:
    budgets = policy.allocate(view)
    held = np.array([layer.n_slots.sum() for layer in view.layers])
    share = view.layers[0].n_head_kv * view.budget
    if "pyramid" in policy.name or "pyramid" in getattr(policy, "allocation", ""):
        assert budgets.sum() == min(view.n_layer * share, held.sum())
    else:
        assert budgets.sum(axis=1).tolist() == np.minimum(share, held).tolist()


CACHES = st.tuples(SEEDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60), st.booleans())


def draw_cache(cache, budget, *, ragged, window):
    seed, n_layer, n_head_kv, group, n_seen, ties = cache
    rng = np.random.default_rng(seed)
    options = {"ragged": ragged, "ties": ties, "window": window}
    return cache_view(
        budget, *[random_layer(rng, n_head_kv, group, n_seen, layer=layer, **options) for layer in range(n_layer)]
    )


@pytest.mark.parametrize(("name", "args"), EXACT)
@given(
    cache=CACHES,
    ragged=st.booleans(),
    tail=st.booleans(),
    sink=st.integers(0, 3),
    window=st.integers(1, 6),
    extra=st.integers(1, 25),
    pool=st.sampled_from(["max", "avg", "none"]),
)
@settings(max_examples=40, deadline=None)
def test_invariants(name, args, cache, ragged, tail, sink, window, extra, pool):
    policy = make_policy(name, {**args, **fitting(name, window=window, pool=pool, kernel=3, sink=sink)})
    view = draw_cache(cache, policy.min_budget - 1 + extra, ragged=ragged, window=0 if tail else window)
    check_invariants(policy, view)
    check_totals(policy, view)


@pytest.mark.parametrize(("name", "args"), DRIFTING)
@given(cache=CACHES, ragged=st.booleans(), window=st.integers(1, 6), extra=st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_invariants_of_upstream_rounding(name, args, cache, ragged, window, extra):
    policy = make_policy(name, {**args, "window": window})
    view = draw_cache(cache, window + extra, ragged=ragged, window=window)
    check_invariants(policy, view)


@pytest.mark.parametrize("name", EVICTING)
@given(SEEDS, st.integers(9, 20), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_repeated_evictions(name, seed, budget, chunk):
    """Tokens arrive in chunks, as in a long chat: heads become ragged, totals stay exact."""
    rng = np.random.default_rng(seed)
    shared = {"window": 4, "kernel": 3, "newest": "keep"} | ({} if name == "streaming" else {"sink": 2})
    policy = make_policy(name, fitting(name, **shared))
    n_layer, n_head = 3, 2
    held = [[np.arange(0)] * n_head for _ in range(n_layer)]
    n_seen = 0
    for _ in range(8):
        new = np.arange(n_seen, n_seen + chunk)
        n_seen += chunk
        held = [[np.r_[p, new].astype(np.int32) for p in layer] for layer in held]
        longest = [max(map(len, layer)) for layer in held]
        scores = [rng.random((2 * n_head, n)) ** 4 for n in longest]
        views = [layer_view(scores[i], n_head, held[i], n_seen, i) for i in range(n_layer)]
        view = cache_view(budget, *views)
        check_totals(policy, view)
        kept = check_invariants(policy, view)
        held = [[p[s] for p, s in zip(layer, slots, strict=True)] for layer, slots in zip(held, kept, strict=True)]
        assert sum(len(p) for layer in held for p in layer) == n_layer * n_head * min(n_seen, budget)


def same(one, other, view) -> None:
    (budgets, kept), (expected, slots) = evict(one, view), evict(other, view)
    assert budgets.tolist() == expected.tolist()
    assert [[s.tolist() for s in layer] for layer in kept] == [[s.tolist() for s in layer] for layer in slots]


@pytest.mark.parametrize("safeguard", ["mix", "protect"])
@pytest.mark.parametrize(("ada", "plain"), [("ada-snapkv", "snapkv"), ("ada-pyramid", "pyramidkv")])
@given(cache=CACHES, ragged=st.booleans(), extra=st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_alpha_one_is_the_plain_policy(safeguard, ada, plain, cache, ragged, extra):
    view = draw_cache(cache, 3 + extra, ragged=ragged, window=3)
    same(make_policy(ada, {"alpha": 1.0, "safeguard": safeguard, "window": 3}), make_policy(plain, {"window": 3}), view)


@pytest.mark.parametrize("safeguard", ["mix", "protect"])
@given(cache=CACHES, alpha=st.floats(0, 1), extra=st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_a_single_head_has_nobody_to_trade_with(safeguard, cache, alpha, extra):
    seed, n_layer, _, group, n_seen, ties = cache
    view = draw_cache((seed, n_layer, 1, group, n_seen, ties), 3 + extra, ragged=True, window=3)
    ada = make_policy("ada-snapkv", {"alpha": alpha, "safeguard": safeguard, "window": 3})
    same(ada, make_policy("snapkv", {"window": 3}), view)


@pytest.mark.parametrize(("pyramid", "flat"), [("pyramidkv", "snapkv"), ("ada-pyramid", "ada-snapkv")])
@given(cache=CACHES, extra=st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_beta_one_is_the_flat_policy(pyramid, flat, cache, extra):
    view = draw_cache(cache, 3 + extra, ragged=False, window=3)
    same(make_policy(pyramid, {"beta": 1, "window": 3}), make_policy(flat, {"window": 3}), view)


@given(SEEDS, st.permutations(range(4)), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_permuting_heads_permutes_what_is_kept(seed, order, extra):
    rng = np.random.default_rng(seed)
    scores = rng.random((4, 40)) ** 3
    policy = make_policy("ada-snapkv", {"window": 3, "pool": "avg", "safeguard": "protect"})
    _, kept = evict(policy, cache_view(3 + extra, layer_view(scores)))
    _, permuted = evict(policy, cache_view(3 + extra, layer_view(scores[order])))
    assert [s.tolist() for s in permuted[0]] == [kept[0][h].tolist() for h in order]


@pytest.mark.parametrize("name", EVICTING)
def test_nothing_is_read_when_nothing_is_evicted(name):
    view = cache_view(50, layer_view(np.zeros((2, 50))))
    layer = view.layers[0]
    layer.read_scores = layer.read_mass = layer.read_kv = None
    _, kept = evict(make_policy(name), view)
    assert [s.tolist() for s in kept[0]] == [list(range(50))] * 2


@pytest.mark.parametrize("name", EVICTING)
def test_budget_below_the_minimum_is_refused(name):
    policy = make_policy(name)
    low = policy.min_budget - 1
    with pytest.raises(UsageError, match=f"{name} needs a budget of at least {low + 1} .* given {low}"):
        policy.allocate(cache_view(low, layer_view(np.ones((2, 50)))))


@pytest.mark.parametrize("name", EVICTING)
def test_impossible_counts_are_refused(name):
    policy = make_policy(name)
    for budgets in ([51, 40], [policy.min_budget - 2, 40]):
        with pytest.raises(ValueError, match=r"keep|budgets"):
            policy.keep(layer_view(np.ones((2, 50))), np.array(budgets))


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in ("full", "buzz", "corm", "ladder")])
def test_a_long_prompt_is_brought_to_the_budget_at_once(name):
    rng = np.random.default_rng(0)
    views = [layer_view(rng.random((9, 8192), dtype=np.float32), 3, layer=layer) for layer in range(4)]
    budgets, kept = evict(make_policy(name), cache_view(1024, *views))
    assert budgets.sum() == 4 * 3 * 1024
    assert [[len(slots) for slots in layer] for layer in kept] == budgets.tolist()
