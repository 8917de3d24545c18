"""What the commands show of the cache of sequence 0, and the prompt cache on disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvlocal.errors import KVError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvlocal.engine.engine import Engine
    from kvlocal_cli.render.heads import Rungs


class LiveFigures:
    """Called again and again: the cache and the speed of sequence 0 now, in `width` columns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start: tuple[int, float] | None = None

    def __call__(self, width: int) -> str:
        from kvlocal_cli.render.report import live_figures

        n, now = len(self._engine.sequences[0].tokens), time.perf_counter()
        if self._start is None:
            self._start = (n, now)
        n_before, before = self._start
        speed = (n - n_before) / (now - before) if n > n_before and now > before else None
        peak = int(self._engine.context.stats().peak_bytes)
        return live_figures(self._engine.kv(), peak, speed, width)


def evicted(engine: Engine) -> bool:
    """Whether anything of what sequence 0 holds was ever evicted."""
    return engine.sequences[0].evicted_at > 0


def read_rungs(engine: Engine) -> Rungs | None:
    """How sequence 0 holds its tokens, per layer and head; None over the stock cache."""
    from kvlocal_cli.render.heads import count_rungs

    cache = engine.cache
    if cache is None:
        return None
    n_seen = len(engine.sequences[0].tokens)
    return count_rungs(n_seen, [cache.slot_formats(0, layer) for layer in range(len(cache.layers))])


def prefill_cached(
    name: str,
    engine: Engine,
    tokens: Sequence[int],
    on_progress: Callable[[int, int], None] | None,
    on_unsaved: Callable[[KVError], None],
) -> int:
    """Read a prompt, but for what a prompt cache on disk has of it; how many tokens that is.

    `on_unsaved` is told why the file could not be written.
    """
    from kvlocal.engine.session import prefill_cached
    from kvlocal_cli.terminal.prompt import file_path

    return prefill_cached(file_path(name), engine, tokens, on_progress=on_progress, on_unsaved=on_unsaved)
