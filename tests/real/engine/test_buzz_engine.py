"""BUZZ in a running model: its size swings as computed, and it follows the attention of the model itself."""

from __future__ import annotations

import numpy as np
from needles import FILLER, GREEDY, OpenEngine, kept_per_head

from kvlocal.policies.buzz import Buzz


def test_the_size_swings_between_its_bounds(open_engine: OpenEngine) -> None:
    budget = 96
    engine = open_engine("buzz", str(budget), {"window": 24, "stride": 4})
    policy, cache = engine.policy, engine.cache
    assert isinstance(policy, Buzz) and cache is not None
    engine.prefill(engine.tokenize(FILLER * 8))
    held = []
    for _ in engine.generate(500, GREEDY):
        stats = cache.seq_stats(0)
        assert stats.held_min == stats.held_max
        held.append(int(stats.held_max))
    later = held[len(held) // 2 :]
    assert max(held[2:]) == policy.peak(budget)
    assert abs(min(later) - (policy.sink + policy.window + policy.steady(budget))) <= 2
    assert abs(np.mean(later) - budget) < 5


def test_fresh_tokens_are_local_maxima_of_the_mass(open_engine: OpenEngine) -> None:
    """The mass is read before the eviction of an equal engine; sinks and window stay, one of every stride between."""
    args = {"window": 16, "sink": 4, "stride": 5, "threshold": 60}
    whole, evicting = open_engine("h2o", "100%"), open_engine("buzz", "96", args)
    tokens = whole.tokenize(FILLER * 8)[:200]
    for engine in (whole, evicting):
        engine.prefill(tokens)
    assert whole.cache is not None
    masses = [whole.cache.mass(0, layer) for layer in range(len(whole.cache.layers))]
    n_head_kv = whole.cache.layers[0].n_head_kv
    for i, kept in enumerate(kept_per_head(evicting)):
        mass = masses[i // n_head_kv].reshape(n_head_kv, -1, 200)[i % n_head_kv].sum(axis=0)
        winners = [j + int(np.argmax(mass[j : min(j + 5, 184)])) for j in range(4, 184, 5)]
        assert kept.tolist() == [*range(4), *winners, *range(184, 200)]
