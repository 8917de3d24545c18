"""Decode and prefill speed by depth with nothing evicted: page kernels, portable path and stock, in turns.

python benchmarks/depth_speed.py --depths 0,2048,4096,7168
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from common import model_path, parser, table, write_json

from kvlocal.context import Context, ContextConfig
from kvlocal.model import Model


def tps(context: Context, n: int, step: Callable[[], None]) -> float:
    """Tokens per second of ``step``, which adds n tokens; they are taken back."""
    depth = context.n_seen(0)
    start = time.perf_counter()
    step()
    context.logits()
    seconds = time.perf_counter() - start
    context.truncate(0, depth)
    return n / seconds


def decode_some(context: Context, n: int, depth: int) -> None:
    for i in range(n):
        context.decode([100 + i], depth + i, 0)
        context.logits()


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--depths", default="0,2048,4096,7168")
    p.add_argument("-n", type=int, default=16, help="tokens decoded per turn")
    p.add_argument("-b", "--batch", type=int, default=512, help="tokens of a prefill step")
    p.add_argument("-r", "--rounds", type=int, default=3)
    args = p.parse_args()
    depths = [int(d) for d in args.depths.split(",")]
    model = Model(model_path(args))
    text = (args.data / "text" / "Doyle_Hound_1902.txt").read_text()
    tokens = model.tokenize(text[: (max(depths) + args.batch) * 12])
    config = {"n_ctx": max(depths) + args.batch + 64, "n_threads": args.threads}
    contexts = {
        "kernels": Context(model, ContextConfig(**config)),
        "portable": Context(model, ContextConfig(**config, portable=True)),
        "stock": Context(model, ContextConfig(**config, paged=False)),
    }
    results = []
    pos = 0
    for depth in depths:
        while pos < depth:
            n = min(512, depth - pos)
            for context in contexts.values():
                context.decode(tokens[pos : pos + n], pos, 0)
            pos += n
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in contexts}
        for _ in range(args.rounds):
            for name, c in contexts.items():
                batch = tokens[depth : depth + args.batch]
                decode = tps(c, args.n, lambda c=c, d=depth: decode_some(c, args.n, d))  # type: ignore[misc]
                prefill = tps(c, len(batch), lambda c=c, b=batch, d=depth: c.decode(b, d, 0))  # type: ignore[misc]
                rounds[name].append((decode, prefill))
        row = {"depth": depth}
        for name, pairs in rounds.items():
            row[f"{name}_decode"] = statistics.median(a for a, _ in pairs)
            row[f"{name}_prefill"] = statistics.median(b for _, b in pairs)
        results.append(row)
    header = [
        "depth",
        "decode: kernels",
        "portable",
        "stock",
        "ratio",
        "prefill: kernels",
        "portable",
        "stock",
        "ratio",
    ]
    rows = []
    for r in results:
        cells = [str(r["depth"])]
        for kind in ("decode", "prefill"):
            cells += [f"{r[f'{name}_{kind}']:.0f}" for name in contexts]
            cells.append(f"{r[f'kernels_{kind}'] / r[f'stock_{kind}']:.2f}")
        rows.append(cells)
    print(table(header, rows))
    write_json(args, results)


if __name__ == "__main__":
    main()
