"""What reading a part costs and saves: decoding a novel's continuation with every token reading the whole cache, a part
that a retriever chooses, or what a policy has left.

All are branches of one text and take turns, each after steps that are not timed. A step is a decoded token and the
choice of what the next one reads. `retrieval_quality.py --only page` puts the figures into docs/retrieval.md.

    python benchmarks/retrieval_speed.py --depths 8192,32768 --budget 1024
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import RESULTS, command, model_path, parser, table, write_json

from kvlocal.engine.evictor import Bounds, Evictor
from kvlocal.engine.sequence import Sequence, append
from kvlocal.measure.code import commit
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.retrieval import REGISTRY, make_retriever
from kvlocal.storage.budget import Budget

N_WARM, N_GEN = 8, 64


@dataclass
class Way:
    """One way to read: what bounds it, and what its steps took."""

    name: str
    bounds: Bounds
    steps: list[float] = field(default_factory=list)
    chooses: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    wanted: float = 0.0
    kept: float = 0.0


def ways(budget: int, n_ctx: int) -> list[Way]:
    def bounds(policy: str, share: str, retriever: str | None = None) -> Bounds:
        found = make_retriever(retriever, {"budget": budget}) if retriever else None
        return Bounds(make_policy(policy), Budget.parse(share), n_ctx=n_ctx, retriever=found)

    return [
        Way("everything", bounds("full", "100%")),
        Way(f"streaming {budget}", bounds("streaming", str(budget))),
        *(Way(f"{name} {budget}", bounds("full", "100%", name)) for name in REGISTRY),
    ]


def run(text: Sequence, way: Way, tokens: list[int]) -> None:
    """One turn on a branch of the text."""
    context = text.context
    branch = Sequence(context, 1)
    text.branch(branch)
    evictor = Evictor(context, way.bounds)
    evictor.after(branch, "prompt")
    for i, token in enumerate(tokens[: N_WARM + N_GEN]):
        start = time.perf_counter()
        append({branch: [token]})
        context.logits()
        middle = time.perf_counter()
        step = evictor.choose(branch)
        end = time.perf_counter()
        if i >= N_WARM:
            way.steps.append(end - start)
            way.chooses.append(end - middle)
            way.read.append(step.n_read if step else evictor.held(branch))
            way.wanted += step.n_wanted if step else 0
            way.kept += step.n_kept if step else 0
    branch.release()


def row(depth: int, way: Way, base: Way, bytes_per_token: int) -> dict[str, Any]:
    p50, p99 = np.percentile(way.steps, [50, 99])
    return {
        "depth": depth,
        "reads": way.name,
        "tokens_per_s": 1 / p50,
        "ratio": float(np.median(base.steps) / p50),
        "p50_ms": 1000 * p50,
        "p99_ms": 1000 * p99,
        "choose_ms": 1000 * float(np.mean(way.chooses)),
        "choose_share": float(np.sum(way.chooses) / np.sum(way.steps)),
        "read": float(np.mean(way.read)),
        "bytes": float(np.mean(way.read)) * bytes_per_token,
        "kept": way.kept / way.wanted if way.wanted else None,
    }


def cells(r: dict[str, Any]) -> list[str]:
    speed = [f"{r['tokens_per_s']:.1f}", f"{r['ratio']:.2f}", f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}"]
    choice = [f"{r['choose_ms']:.2f}", f"{r['choose_share']:.1%}", f"{r['read']:,.0f}"]
    return [f"{r['depth']:,}", r["reads"], *speed, *choice, "" if r["kept"] is None else f"{r['kept']:.0%}"]


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--depths", default="8192,32768")
    p.add_argument("--budget", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--text", default="Burnett_Garden_1911.txt")
    args = p.parse_args()
    depths = sorted(map(int, args.depths.split(",")))
    n_ctx = depths[-1] + N_WARM + N_GEN + 64
    model = Model(model_path(args))
    tokens = model.tokenize((args.data / "text" / args.text).read_text("utf-8"))
    rows, notes = [], []
    # what retrievers ask is remembered, as it is of other policies
    config = ContextConfig(n_ctx, n_threads=args.threads, n_seq_max=2, n_window=64)
    with Context(model, config) as context:
        assert context.cache is not None
        text = Sequence(context, 0)
        prefill_s = 0.0
        for depth in depths:
            start = time.perf_counter()
            for i in range(len(text.tokens), depth, 512):
                append({text: tokens[i : min(i + 512, depth)]}, outputs="none")
            model.llama.llama_synchronize(context.handle)
            prefill_s += time.perf_counter() - start
            found = ways(args.budget, n_ctx)
            for way in [way for _ in range(args.rounds) for way in found]:
                run(text, way, tokens[depth:])
            rows += [row(depth, way, found[0], context.cache.bytes_per_token) for way in found]
            for name in ("sentencekv", "quest"):
                evictor = Evictor(
                    context, Bounds(make_policy("full"), Budget.parse("100%"), retriever=make_retriever(name))
                )
                branch = Sequence(context, 1)
                text.branch(branch)
                assert evictor.retrieving is not None
                start = time.perf_counter()
                evictor.retrieving.index(branch)
                seconds = time.perf_counter() - start
                index_bytes = int(context.stats().index_bytes)
                branch.release()
                notes.append(
                    {
                        "depth": depth,
                        "retriever": name,
                        "index_s": seconds,
                        "prefill_share": seconds / prefill_s,
                        "bytes_share": index_bytes / (depth * context.cache.bytes_per_token),
                    }
                )
    print(f"{model.name}, {args.threads} threads, commit {commit()}: `{command(p, args, 'retrieval_speed')}`\n")
    print(
        table(
            ["depth", "reads", "t/s", "x everything", "p50 ms", "p99 ms", "choice ms", "of the step", "tokens", "kept"],
            [cells(r) for r in rows],
        )
    )
    for note in notes:
        print(
            f"{note['depth']:,} {note['retriever']}: what stands for units took {note['index_s']:.3f} s, "
            f"{note['prefill_share']:.2%} of reading the text, and {note['bytes_share']:.2%} of its bytes in f16"
        )
    results = {"command": command(p, args, "retrieval_speed"), "model": model.name, "rows": rows, "index": notes}
    write_json(args, results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "retrieval-speed.json").write_text(json.dumps(results | {"commit": commit()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
