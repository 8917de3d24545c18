"""Decode speed of a long prompt within a small budget, against stock llama.cpp at a depth of that budget.

Both contexts live in one process and take turns, so that the ratio holds on a machine whose speed drifts.

    python benchmarks/decode_speed.py --prompt 4096 --budget 512
"""

from __future__ import annotations

import statistics
import time

from common import model_path, parser, write_json

from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import Sequence
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy


def read(context: Context, tokens: list[int]) -> None:
    for i in range(0, len(tokens), 512):
        context.decode(tokens[i : i + 512], i, 0)


def decode_tps(context: Context, n: int) -> float:
    """Tokens per second over n single tokens, which are taken back afterwards."""
    begin = context.n_seen(0)
    start = time.perf_counter()
    for i in range(n):
        context.decode([100 + i], begin + i, 0)
        context.logits()
    tps = n / (time.perf_counter() - start)
    context.truncate(0, begin)
    return tps


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--prompt", type=int, default=4096)
    p.add_argument("--budget", type=int, default=512)
    p.add_argument("--policy", default="ada-snapkv")
    p.add_argument("-n", type=int, default=32, help="tokens per turn")
    p.add_argument("-r", "--rounds", type=int, default=9)
    args = p.parse_args()
    model = Model(model_path(args))
    text = (args.data / "text" / "Doyle_Hound_1902.txt").read_text()
    tokens = model.tokenize(text[: args.prompt * 12])[: args.prompt]
    threads = {"n_threads": args.threads}
    with (
        Context(model, ContextConfig(n_ctx=args.prompt + 256, **threads)) as ours,
        Context(model, ContextConfig(n_ctx=args.prompt + 256, paged=False, **threads)) as stock,
    ):
        assert ours.cache is not None
        read(ours, tokens)
        start = time.perf_counter()
        evict(Sequence.adopt(ours, 0), make_policy(args.policy), args.budget)
        evict_s = time.perf_counter() - start
        read(stock, tokens[: args.budget])
        rounds = []
        for i in range(args.rounds + 1):
            a, b = decode_tps(ours, args.n), decode_tps(stock, args.n)
            if i > 0:  # the first warms up
                rounds.append((a, b))
    ratios = sorted(a / b for a, b in rounds)
    result = {
        "prompt": args.prompt,
        "budget": args.budget,
        "ours_tps": statistics.median(a for a, _ in rounds),
        "stock_tps": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "evict_s": evict_s,
    }
    print(
        f"{model.name}, {args.threads} threads: {args.budget} tokens held of {args.prompt}: "
        f"{result['ours_tps']:.1f} t/s; stock at depth {args.budget}: {result['stock_tps']:.1f} t/s; "
        f"ratio {result['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); eviction {evict_s:.2f} s"
    )
    write_json(args, [result])


if __name__ == "__main__":
    main()
