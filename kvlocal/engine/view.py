"""What a policy sees of a sequence: the paged cache as views of numpy arrays."""

from __future__ import annotations

from functools import partial

import numpy as np

from kvlocal.engine.sequence import Sequence
from kvlocal.native.cache import PagedCache
from kvlocal.native.formats import FORMATS
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.parts.view import CacheView, LayerView


def cache_view(sequence: Sequence, policy: Policy, budget: int, *, n_room: int = 0, n_free: int = 0) -> CacheView:
    """What a policy sees of a sequence; scores are computed when the policy asks.

    ``n_room``: slots that one head has room for, 0: any number; ``n_free``: of these, f16 slots that must stay free.
    """
    cache, seq = sequence.context.cache, sequence.seq
    assert cache is not None
    n_window = policy.n_window
    n_seen = int(cache.seq_stats(seq).n_seen)
    views = [
        LayerView(
            layer=i,
            n_head=layer.n_head,
            n_head_kv=layer.n_head_kv,
            positions=cache.positions(seq, i),
            n_seen=n_seen,
            read_scores=partial(cache.window_scores, seq, i, n_window, policy.rms) if n_window > 0 else None,
            n_window=min(n_window, n_seen),
            read_queries=partial(cache.queries, seq, i, n_window),
            rotate=partial(cache.rotate, i),
            kq_scale=layer.kq_scale,
            read_mass=partial(cache.mass, seq, i),
            read_kv=partial(cache.keys_values, seq, i),
            read_value_norms=partial(cache.value_norms, seq, i),
            slot_bytes={name: layer.slot_bytes(name) for name in cache.formats},
            read_formats=partial(_formats, cache, seq, i),
            n_room=n_room,
            n_free=n_free,
            evicted_at=max(sequence.evicted_at - sequence.rolled, 0),
        )
        for i, layer in enumerate(cache.layers)
    ]
    return CacheView(layers=views, budget=budget)


def _formats(cache: PagedCache, seq: int, layer: int) -> list[np.ndarray]:
    """Slot formats as indices into :attr:`PagedCache.formats`."""
    known = np.array([cache.formats.index(name) if name in cache.formats else 0 for name in FORMATS])
    return [known[f] for f in cache.slot_formats(seq, layer)]
