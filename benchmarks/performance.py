"""Speed, accuracy and cost of the page kernels against llama.cpp's own; writes docs/performance.md.

python benchmarks/performance.py                    # everything: about an hour on two cores, nothing else running
python benchmarks/performance.py --only error,mass  # some parts again; the others come from --results
python benchmarks/performance.py --only ""          # only the page, from --results
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, at_commit, model_path, parser
from pages.performance import page

from kvlocal.doctor.kernels import attend_pages, attend_stock, reference
from kvlocal.engine.evictor import evict
from kvlocal.engine.sequence import Sequence
from kvlocal.measure.bench import bench, random_tokens
from kvlocal.measure.bench_config import BenchConfig, Step
from kvlocal.measure.code import commit
from kvlocal.measure.machine import describe_machine
from kvlocal.measure.variants import expand
from kvlocal.models.random import random_model
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy

DEPTHS = (0, 1024, 2048, 4096, 7168, 8192, 32768)
BUDGET = 1024
RESULTS = Path(__file__).parent / "results" / "performance.json"


def fill(context: Context, tokens: np.ndarray, begin: int, end: int) -> float:
    """Read tokens [begin, end) in steps of 512; seconds."""
    start = time.perf_counter()
    for pos in range(begin, end, 512):
        context.decode(tokens[pos : min(pos + 512, end)], pos, 0, outputs="none")
    return time.perf_counter() - start


def decode_ms(context: Context, tokens: np.ndarray, seq: int = 0, n: int = 16) -> float:
    """Milliseconds per decoded token; the n tokens are taken back."""
    pos = context.n_seen(seq)
    start = time.perf_counter()
    for i in range(pos, pos + n):
        context.decode(tokens[i - pos : i - pos + 1], i, seq)
        context.logits()
    seconds = time.perf_counter() - start
    context.truncate(seq, pos)
    return 1000 * seconds / n


def sweep(path: Path, depths: tuple[int, ...], n_threads: int) -> list[dict[str, Any]]:
    """`kvlocal bench` over the stock cache, ours with nothing evicted, and ours at a budget."""
    variants = expand(["full", "paged"], {}, ["100%"])
    variants += expand(["ada-snapkv"], {}, [str(BUDGET)], prefills=["chunked"])
    config = BenchConfig(variants, depths=depths, n_gen=16, repetitions=5, n_threads=n_threads)
    last = ""

    def show(step: Step) -> None:
        nonlocal last
        now = f"depth {step.depth}: {step.action} {step.label}"
        if now != last:
            print(time.strftime("%H:%M:%S"), now, flush=True)
        last = now

    model = Model(path)
    try:
        return [asdict(result) for result in bench(model, config, show)]
    finally:
        model.close()


def error() -> list[dict[str, Any]]:
    """Relative error (2-norm) of one decode step against f64, f16 keys and values, 4 query heads on one KV head."""
    out = []
    for d, n, spread, name in [
        (d, n, spread, name)
        for d in (64, 128)
        for n in (4096, 8192, 32768)
        for spread, name in ((0.05, "flat"), (1.0, "normal"))
    ]:
        rng = np.random.default_rng(n)
        q = (spread * rng.standard_normal((1, 4, d))).astype(np.float32)
        k = rng.standard_normal((1, n, d)).astype(np.float16)
        v = rng.standard_normal((1, n, d)).astype(np.float16)
        want, _ = reference(q, list(k), list(v))
        got = {"pages": attend_pages(q, list(k), list(v), n_split=16)[0], "stock": attend_stock(q, k, v)}
        errors = {key: float(np.linalg.norm(x - want) / np.linalg.norm(want)) for key, x in got.items()}
        out.append({"head": d, "slots": n, "attention": name, **errors})
    return out


def eviction(path: Path, n_threads: int, n: int = 8192) -> list[dict[str, Any]]:
    """One eviction at the end of a prompt, memory given back included, beside the prompt's own time."""
    model = Model(path)
    tokens = random_tokens(model, n)
    out = []
    with Context(model, ContextConfig(n_ctx=n + 64, n_threads=n_threads)) as context:
        assert context.cache is not None
        for name in ("snapkv", "pyramidkv", "ada-snapkv", "ada-pyramid"):
            seconds = fill(context, tokens, 0, n)
            before = context.stats()
            start = time.perf_counter()
            evict(Sequence.adopt(context, 0), make_policy(name, {}), BUDGET)
            spent = time.perf_counter() - start
            after = context.stats()
            out.append(
                {
                    "policy": name,
                    "prompt": n,
                    "prompt_s": seconds,
                    "evict_s": spent,
                    "score_s": (after.score_us - before.score_us) / 1e6,
                    "keep_s": (after.keep_us - before.keep_us) / 1e6,
                }
            )
            context.truncate(0, 0)
    model.close()
    return out


def mass(path: Path, n_threads: int) -> list[dict[str, Any]]:
    """Decoding with and without attention mass, in turns; attention time is what a step takes more than at depth 0."""
    model = Model(path)
    tokens = random_tokens(model, 8192)
    out = []
    with (
        Context(model, ContextConfig(n_ctx=8192 + 64, n_threads=n_threads)) as context,
        Context(model, ContextConfig(n_ctx=64, n_threads=n_threads)) as empty,
    ):
        assert context.cache is not None
        pos = 0
        for depth in (2048, 8192):
            context.cache.accumulate_mass("none")
            fill(context, tokens, pos, depth)
            pos = depth
            rounds = []
            for _ in range(25):
                times = []
                for kind in ("none", "sum"):
                    context.cache.accumulate_mass(kind)
                    decode_ms(context, tokens, n=1)
                    times.append(decode_ms(context, tokens, n=8))
                rounds.append((*times, decode_ms(empty, tokens, n=8)))
            plain, with_mass, base = (float(x) for x in np.median(rounds, axis=0))
            out.append({"depth": depth, "plain_ms": plain, "mass_ms": with_mass, "base_ms": base})
    model.close()
    return out


def linear(path: Path, n_threads: int) -> list[dict[str, Any]]:
    """Milliseconds per token by slots kept: of a text of that length, and of one of 8192 tokens after eviction.

    Both are branches of the same text and take turns.
    """
    model = Model(path)
    kept = (256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
    tokens = random_tokens(model, kept[-1])
    policy = make_policy("streaming", {})
    times: dict[tuple[int, int], list[float]] = {}
    with Context(model, ContextConfig(n_ctx=kept[-1] + 64, n_threads=n_threads, n_seq_max=2)) as context:
        assert context.cache is not None
        fill(context, tokens, 0, kept[-1])
        for _ in range(7):
            for n in kept:
                for evicted in sorted({0, kept[-1] - n}):
                    context.branch(0, 1)
                    if evicted:
                        evict(Sequence.adopt(context, 1), policy, n)
                    else:
                        context.truncate(1, n)
                    decode_ms(context, tokens, 1, n=1)
                    times.setdefault((n, evicted), []).append(decode_ms(context, tokens, 1, n=8))
    model.close()
    return [{"kept": n, "evicted": gone, "ms": float(np.median(ms))} for (n, gone), ms in sorted(times.items())]


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--only", help="parts to measure, comma-separated (default: all)")
    p.add_argument("--results", type=Path, default=RESULTS, help="where all figures are kept")
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    args = p.parse_args()
    path = model_path(args)
    parts: dict[str, Callable[[], Any]] = {
        "machine": lambda: asdict(describe_machine(args.threads)),
        "error": error,
        "mass": lambda: mass(path, args.threads),
        "eviction": lambda: eviction(path, args.threads),
        "linear": lambda: linear(path, args.threads),
        "smollm2-135m": lambda: sweep(path, DEPTHS, args.threads),
        "llama-1b": lambda: sweep(random_model("llama-1b"), DEPTHS, args.threads),
    }
    args.results.parent.mkdir(exist_ok=True)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for name in parts if args.only is None else filter(None, args.only.split(",")):
        print(time.strftime("%H:%M:%S"), name, flush=True)
        results[name] = parts[name]()
        results.setdefault("commit", {})[name] = commit()
        args.results.write_text(json.dumps(results, indent=1) + "\n")
    commits = {name: results.get("commit", {}).get(name, "") for name in parts if name in results}
    args.page.write_text(page(results, at_commit(commits)))


if __name__ == "__main__":
    main()
