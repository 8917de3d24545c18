"""The examples of the specifications that no other module has, and the methods behind them against plain models.

What is where (E: eviction of a prompt and baselines, U: eviction while decoding)::

    E1  scores of SnapKV        test_scoring: ..._of_the_worked_example; test_policies: test_snapkv_example
    E2  query heads of a group  test_scoring: test_group_reduction..., test_order_of_reduction...;
                                test_policies: test_group_example, test_pooling_order_example, test_one_kv_head_...
    E3  Ada-KV                  test_allocation: ..._of_the_readme_figure, test_two_heads, test_concentrated_heads_...;
                                test_policies: test_ada_example, test_ada_example_slots
    E4  rounding, pyramids      test_allocation: test_rounding_examples, test_pyramid_examples;
                                test_policies: test_pyramid_example, test_ada_pyramid_...; a short prompt: here
    E5  bound, ragged append    test_policy_theory: test_bound_is_tight_...; pages have no flat layout to append to, so
                                native/test_evict: test_positions_are_the_true_ones, native/test_policy_matrix
    E6  baselines               test_policies: test_streaming_example; test_policy_baselines: test_keydiff_example,
                                test_knorm_example, test_mass_of_uniform_attention; expected attention: here
    U1, U2, U3  BUZZ step by step          test_buzz: test_first_and_later_evictions
    U4  its heads                          test_buzz: test_heads_choose_for_themselves
    U5  old slots by index                 test_buzz: test_old_slots_are_thinned_by_index
    U6  a uniform prompt                   test_buzz: test_uniform_prompt; all of the sums: here
    U7  query heads of a group             test_buzz: test_query_heads_of_a_group_are_neighbours
    U8, U9  sizes over time                test_buzz: test_sizes_over_time
    U10 small strides                      test_buzz: test_sizes_over_time (13 slots), and here (refused)
    U11 the slot that never goes           test_buzz: test_slot_zero_without_sinks_stays_for_ever
    U12 H2O                                test_policy_baselines: test_h2o_sequence
    U13 StreamingLLM                       here
    U14 TOVA                               test_policy_baselines: test_tova_sequence
    U15 CORM                               test_corm: test_u15_...
    U16 the cascade                        here
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from buzz_reference import Cascade
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import cache_view, evict, layer_view, random_layer, rotate

from kvlocal.errors import KVError, UsageError
from kvlocal.policies import LayerView, Policy, make_policy
from kvlocal.policies.cascading import Cascading
from kvlocal.policies.expected_attention import ExpectedAttention, mean_rotation

SEEDS = st.integers(0, 2**32 - 1)


def kept_of(policy: Policy, layer: LayerView, budget: int) -> list[list[int]]:
    return [slots.tolist() for slots in evict(policy, cache_view(budget, layer))[1][0]]


def held_after(policy: Policy, budget: int, rows: np.ndarray, every: int = 1) -> list[list[int]]:
    """Tokens held after every eviction of one KV head: token ``t`` comes with the masses ``rows[:, t]`` for good."""
    held, out = np.arange(0), []
    for t in range(rows.shape[1]):
        held = np.r_[held, t]
        if t % every != every - 1:
            continue
        layer = layer_view(rows[:, held], 1, [held.astype(np.int32)], t + 1)
        if policy.due(len(held), budget):
            held = held[kept_of(policy, layer, budget)[0]]
        out.append(held.tolist())
    return out


# E4, U6, U10, U13


def test_e4_a_prompt_shorter_than_the_budget_stays_whole() -> None:
    rng = np.random.default_rng(0)
    for name in ("pyramidkv", "ada-pyramid"):
        for compat in ("none", "adakv", "kvpress"):
            policy = make_policy(name, {"window": 4, "beta": 4, "compat": compat})
            view = cache_view(20, *[layer_view(rng.random((2, 19))) for _ in range(4)])
            assert policy.allocate(view).tolist() == [[19, 19]] * 4


def test_u6_attention_sums_of_a_uniform_prompt() -> None:
    sums = (np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]).sum(axis=0)
    np.testing.assert_allclose(sums, [2.7179, 1.7179, 1.2179, 0.8845, 0.6345, 0.4345, 0.2679, 0.125], atol=5e-5)
    policy = make_policy("buzz", {"sink": 1, "window": 1, "stride": 3, "threshold": 5})
    assert kept_of(policy, layer_view(sums[None]), 0) == [[0, 1, 4, 7]]


@pytest.mark.parametrize("stride", [1, 2])
def test_u10_strides_that_never_thin_out_are_refused(stride: int) -> None:
    with pytest.raises(UsageError, match=f"stride={stride} is not possible for policy buzz"):
        make_policy("buzz", {"stride": stride})


def test_u13_streaming_keeps_sinks_and_the_newest() -> None:
    assert held_after(make_policy("streaming", {"sink": 1}), 4, np.zeros((1, 7)))[-1] == [0, 4, 5, 6]


def test_u13_rolled_positions_follow_the_slots() -> None:
    """Slots 0 to 3, and the next query at 4, after every token."""
    policy = make_policy("streaming", {"sink": 1, "positions": "rolled"})
    tokens = np.arange(0)
    for t in range(7):
        tokens = np.r_[tokens, t]
        layer = layer_view(np.zeros((1, len(tokens))))
        if policy.due(len(tokens), 4):
            assert policy.rolls and layer.n_seen == 5
            tokens = tokens[kept_of(policy, layer, 4)[0]]
    assert tokens.tolist() == [0, 4, 5, 6]


# U16: the cascade


U16 = np.array([[0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5]])


def test_u16_the_cascade_after_every_token() -> None:
    held = held_after(Cascading(sink=1, cascades=2), 5, U16)
    assert held[:5] == [list(range(n)) for n in range(1, 6)]
    assert held[5:] == [[0, 2, 3, 4, 5], [0, 2, 4, 5, 6], [0, 4, 5, 6, 7], [0, 4, 6, 7, 8], [0, 6, 7, 8, 9]]


def plain_cascade(scores: np.ndarray, sink: int, sizes: list[int]) -> list[list[int]]:
    """Token by token, as it is described; what is held after each."""
    first, rings, out = [], [[] for _ in sizes], []
    for t in range(len(scores)):
        if len(first) < sink:
            first.append(t)
        carried = None if t < sink else t
        for i, (ring, size) in enumerate(zip(rings, sizes, strict=True)):
            if carried is None:
                break
            if t <= sum(sizes) + sink or (t - sink) % 2**i == 0:
                ring.append(carried)
                carried = ring.pop(0) if len(ring) > size else None
            else:
                if scores[carried] >= scores[ring[-1]]:
                    ring[-1] = carried
                carried = None
        out.append(first + list(itertools.chain(*reversed(rings))))
    return out


@given(SEEDS, st.integers(0, 3), st.integers(1, 5), st.integers(1, 23), st.integers(1, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_cascade_worked_off_in_one_eviction_is_the_one_token_by_token(
    seed: int, sink: int, cascades: int, capacity: int, every: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 3, (2, 90)) / 4 if ties else rng.random((2, 90))
    policy = Cascading(sink=sink, cascades=cascades)
    sizes = policy.sizes(capacity)
    assert sum(sizes) == capacity and min(sizes) > 0 and len(sizes) <= cascades
    want = plain_cascade(rows.mean(axis=0), sink, sizes)
    assert held_after(policy, sink + capacity, rows, every) == want[every - 1 :: every]


@given(SEEDS, st.integers(0, 3), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_cascade_equals_the_reference(seed: int, sink: int, cascades: int, each: int) -> None:
    reference = Cascade(each, cascades, sink)
    scores = np.random.default_rng(seed).random(80)
    want = []
    for t, score in enumerate(scores):
        reference.insert(t, score)
        want.append(reference.order())
    assert held_after(Cascading(sink=sink, cascades=cascades), sink + cascades * each, scores[None]) == want


def test_one_ring_is_streaming() -> None:
    rows = np.random.default_rng(0).random((1, 60))
    streaming = make_policy("streaming", {"sink": 3})
    assert held_after(Cascading(sink=3, cascades=1), 12, rows) == held_after(streaming, 12, rows)


def test_the_cascade_reaches_back_as_far_as_it_says() -> None:
    """Rings of eight with one of 1, 2, 4 and 8 neighbours: 120 tokens, give or take two of the sparsest."""
    after = held_after(Cascading(sink=4, cascades=4), 36, np.random.default_rng(1).random((1, 400)))
    for n, held in enumerate(after[200:], 201):
        assert held[:4] == [0, 1, 2, 3] and held[-8:] == list(range(n - 8, n))
        assert abs(n - held[4] - 8 * 15) <= 2 * 8


# E6: expected attention


KEYS = np.array([[1.0, 0], [2, 0], [0, 3], [1, 1]])


@pytest.mark.parametrize("shift", range(4))
def test_e6_expected_attention(shift: int) -> None:
    """Queries with mean (1, 0) and covariance diag(0, 2), no rotation. The newest slot has no score, so all take turns
    to be it."""
    layer = layer_view(np.zeros((1, 4)))
    keys = np.roll(KEYS, shift, axis=0)
    layer.read_kv = lambda h: (keys, 2 * keys)
    layer.read_queries = lambda: np.array([[[1, 2**0.5]], [[1, -(2**0.5)]]])
    layer.rotate = lambda rows, positions: rows
    layer.kq_scale = 2**-0.5
    policy = ExpectedAttention(sink=0, vnorm="no")
    want = np.roll([0.0204, 0.0413, 0.9047, 0.0336], shift)
    np.testing.assert_allclose(policy.scores(layer, policy.region(layer))[0, :3], want[:3], atol=5e-5)
    weighted = ExpectedAttention(sink=0, epsilon=0.5)
    want = (want + 0.5) * 2 * np.linalg.norm(keys, axis=1)
    np.testing.assert_allclose(weighted.scores(layer, policy.region(layer))[0, :3], want[:3], atol=1e-3)


def dense_expectation(layer: LayerView, policy: ExpectedAttention) -> list[np.ndarray]:
    """The formula, one vector at a time."""
    assert layer.read_queries is not None
    queries = layer.read_queries()
    m, n_head, d = queries.shape
    units = np.eye(d, dtype=np.float32)
    mean_turn = np.mean(
        [rotate(units, np.full(d, layer.n_seen + t)).T for t in range(policy.n_future)], axis=0, dtype=np.float64
    )
    scores = [np.zeros(len(p)) for p in layer.positions]
    group = n_head // layer.n_head_kv
    for q in range(n_head):
        rows = []
        for i in range(m):
            at = layer.n_seen - m + i
            if at >= policy.sink:
                rows.append(rotate(queries[i, q][None], np.array([-at]))[0])
        mu = mean_turn @ np.mean(rows, axis=0)
        sigma = mean_turn @ np.cov(np.array(rows).T, bias=True) @ mean_turn.T
        keys, _ = layer.keys_values(q // group)
        z = np.array([k @ mu * layer.kq_scale + k @ sigma @ k * layer.kq_scale**2 / 2 for k in keys.astype(float)])
        p = np.where(layer.positions[q // group] >= policy.sink, np.exp(z - z.max()), 0)
        scores[q // group] += p / p.sum() / group
    values = [layer.keys_values(h)[1] for h in range(layer.n_head_kv)]
    return [(s + policy.epsilon) * np.linalg.norm(v, axis=1) for s, v in zip(scores, values, strict=True)]


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(12, 50), st.integers(0, 5), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_expected_attention_equals_a_dense_computation(
    seed: int, n_head_kv: int, group: int, n_seen: int, sink: int, n_future: int
) -> None:
    layer = random_layer(np.random.default_rng(seed), n_head_kv, group, n_seen)
    policy = ExpectedAttention(sink=sink, n_future=n_future, epsilon=0.01, window=2)
    where = policy.region(layer)
    got = policy.scores(layer, where)
    for h, want in enumerate(dense_expectation(layer, policy)):
        chosen = slice(where.start[h], where.stop[h])
        np.testing.assert_allclose(got[h, chosen], want[chosen], rtol=1e-4)
        assert np.isneginf(got[h, where.stop[h] :]).all() and np.isneginf(got[h, : where.start[h]]).all()


@given(st.integers(0, 5000), st.integers(1, 70), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_the_mean_rotation_is_the_mean_of_the_rotations(first: int, n: int, d: int) -> None:
    units = np.eye(d, dtype=np.float32)
    want = np.mean([rotate(units, np.full(d, first + t)).T for t in range(n)], axis=0)
    np.testing.assert_allclose(mean_rotation(rotate, d, first, n), want, atol=1e-5)


def test_queries_of_the_sinks_count_only_where_there_are_no_others() -> None:
    layer = layer_view(np.zeros((1, 10)))
    queries = np.random.default_rng(0).standard_normal((10, 1, 4)).astype(np.float32)
    policy = ExpectedAttention(sink=4)
    layer.read_queries = lambda: queries
    before = policy.scores(layer, policy.region(layer))
    queries[:4] = 9
    np.testing.assert_array_equal(policy.scores(layer, policy.region(layer)), before)
    queries[4] = 9
    assert not np.array_equal(policy.scores(layer, policy.region(layer)), before)
    sinks_only = ExpectedAttention(sink=10)
    assert np.isneginf(sinks_only.scores(layer, sinks_only.region(layer))).all()


def test_without_queries_it_says_so() -> None:
    layer = layer_view(np.zeros((1, 10)))
    policy = make_policy("expected-attention")
    layer.read_queries = lambda: np.zeros((0, 1, 4), np.float32)
    with pytest.raises(KVError, match="layer 0: no queries are remembered"):
        evict(policy, cache_view(6, layer))
    layer.read_queries = None
    with pytest.raises(ValueError, match="carries no queries"):
        evict(policy, cache_view(6, layer))


# ChunkKV


def test_chunks_are_kept_whole_best_first() -> None:
    """Two query heads of one KV head, chunks of 2 and a last one of 1: means 1, 1.5, 1.5, 3; ties to the lower one."""
    scores = np.array([[1, 2, 0, 0, 5, 1, 4, 0], [1, 0, 3, 3, 0, 0, 2, 0.0]])
    kept = {
        n: kept_of(make_policy("chunkkv", {"window": 1, "chunk": 2}), layer_view(scores, 1), n) for n in range(2, 8)
    }
    assert kept[2] == [[6, 7]]
    assert kept[3] == [[2, 6, 7]], "of a chunk that does not fit the lower slot stays"
    assert kept[4] == [[2, 3, 6, 7]]
    assert kept[6] == [[2, 3, 4, 5, 6, 7]]
    assert kept_of(make_policy("chunkkv", {"window": 1, "chunk": 2, "sink": 1}), layer_view(scores, 1), 4) == [
        [0, 3, 4, 7]
    ]


@given(SEEDS, st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_chunks_of_one_are_snapkv_without_pooling(seed: int, extra: int) -> None:
    layer = random_layer(np.random.default_rng(seed), 2, 2, 40, window=3)
    for allocation, other in (("uniform", "snapkv"), ("ada", "ada-snapkv"), ("ada-pyramid", "ada-pyramid")):
        chunks = make_policy("chunkkv", {"window": 3, "chunk": 1, "allocation": allocation})
        plain = make_policy(other, {"window": 3, "pool": "none"})
        assert kept_of(chunks, layer, 3 + extra) == kept_of(plain, layer, 3 + extra)
