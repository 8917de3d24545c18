"""What a selection costs: attention that sees 1,024 of 32k slots, beside a cache that holds those 1,024.

Both are branches of one text and take turns, each after tokens that are not timed, since the one before has left its
own pages and weights in the CPU's caches; the model is that of compare_builds.py, with random weights.

    python benchmarks/selection.py --depth 32768 --selected 1024
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from common import command, parser, write_json
from compare_builds import SHAPE

from kvlocal.measure.code import commit
from kvlocal.models.random import write_random_model
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model

N_GEN, N_WARM = 16, 4


def decode_ms(context: Context, seq: int, depth: int) -> float:
    """Milliseconds per token; the tokens are taken back."""
    start = 0.0
    for i in range(N_WARM + N_GEN):
        if i == N_WARM:
            start = time.perf_counter()
        context.decode([100 + i], depth + i, seq)
        context.logits()
    ms = 1000 * (time.perf_counter() - start) / N_GEN
    context.truncate(seq, depth)
    return ms


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--depth", type=int, default=32768)
    p.add_argument("--selected", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 256, args.depth)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(write_random_model(SHAPE, Path(folder) / "model.gguf"))
        config = ContextConfig(args.depth + 64, n_threads=args.threads, n_seq_max=3)
        with Context(model, config) as context:
            cache = context.cache
            assert cache is not None
            for i in range(0, args.depth, 512):
                context.decode(tokens[i : i + 512], i, 0, outputs="none")
            for seq in (1, 2):
                cache.branch(0, seq)
            # whole pages, as retrieval reads them, and the last one
            n_pages = args.depth // 32
            chosen = np.append(rng.choice(n_pages - 1, args.selected // 32 - 1, replace=False), n_pages - 1)
            slots = np.concatenate([np.arange(32 * page, 32 * page + 32) for page in np.sort(chosen)])
            for layer, info in enumerate(cache.layers):
                cache.select(1, layer, [slots] * info.n_head_kv)
                cache.keep(2, layer, [slots] * info.n_head_kv)
            times = np.zeros((args.rounds, 3))
            for i in range(args.rounds):
                for seq in np.roll((0, 1, 2), i)[:: 1 - 2 * (i % 2)]:
                    times[i, seq] = decode_ms(context, int(seq), args.depth)
    everything, selected, held = np.median(times[1:], axis=0)
    ratio = float(np.median(times[1:, 1] / times[1:, 2]))
    print(f"{command(p, args, 'selection')} at {commit()}")
    print(
        f"{args.selected} of {args.depth} slots selected: {selected:.2f} ms per token; a cache that holds them: "
        f"{held:.2f} ms; everything seen: {everything:.2f} ms. Selected / held: {ratio:.3f}."
    )
    write_json(args, {"selected_ms": selected, "held_ms": held, "everything_ms": everything, "ratio": ratio})


if __name__ == "__main__":
    main()
