"""One eviction: a policy looks at a sequence and the cache keeps what it says."""

from __future__ import annotations

from kvlocal.cache import PagedCache
from kvlocal.policies.base import Policy


def evict(cache: PagedCache, seq: int, policy: Policy, budget: int) -> bool:
    """Bring a sequence down to ``budget`` tokens per KV head and layer, on average.

    Returns:
        ``False`` if it already is within the budget, and nothing was done.
    """
    stats = cache.seq_stats(seq)
    if stats.n_slots <= budget * stats.n_heads:
        return False
    view = cache.view(seq, budget, policy.n_window)
    budgets = policy.allocate(view)
    for layer, counts in zip(view.layers, budgets, strict=True):
        cache.keep(seq, layer.layer, policy.keep(layer, counts))
        layer.release()
    cache.trim()
    return True
