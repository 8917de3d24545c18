"""One side of compare_builds.py: a cache at some depth, which is asked for turns on standard input.

    python benchmarks/measure/build_worker.py MODEL DEPTH KV THREADS

Every line, "decode" or "prefill", is answered with milliseconds. It needs nothing but the package, so that the virtual
environment of another checkout can run it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

N_PROMPT, N_GEN = 256, 16


class Worker:
    """One side: a cache at some depth, asked for turns."""

    def __init__(self, model: Path, depth: int, kv: str, threads: int) -> None:
        self.depth = depth
        formats = () if kv == "f16" else (kv,)
        config = ContextConfig(
            depth + N_PROMPT + 64, n_threads=threads, n_seq_max=1, formats=formats, rotate=bool(formats), n_ubatch=512
        )
        self.context = Context(Model(model), config)
        self.tokens = np.random.default_rng(0).integers(3, 256, depth + N_PROMPT + 1)
        for i in range(0, depth, 512):
            self.context.decode(self.tokens[i : min(i + 512, depth)], i, 0, outputs="none")
            self._demote(kv, max(0, i - 512), i)

    def _demote(self, kv: str, begin: int, end: int) -> None:
        cache = self.context.cache
        assert cache is not None
        if kv != "f16" and end > begin:
            for layer in range(len(cache.layers)):
                cache.demote_due(0, layer, np.arange(begin, end, dtype=np.int32), kv)

    def decode(self) -> float:
        """Milliseconds per token."""
        start = time.perf_counter()
        for i in range(N_GEN):
            self.context.decode(self.tokens[i : i + 1], self.depth + i, 0)
            self.context.logits()
        return self._done(start) / N_GEN

    def prefill(self) -> float:
        """Milliseconds for a prompt batch."""
        start = time.perf_counter()
        self.context.decode(self.tokens[:N_PROMPT], self.depth, 0, outputs="none")
        return self._done(start)

    def _done(self, start: float) -> float:
        ms = 1000 * (time.perf_counter() - start)
        self.context.truncate(0, self.depth)
        return ms


def main() -> None:
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(getattr(worker, line.strip())(), flush=True)


if __name__ == "__main__":
    main()
