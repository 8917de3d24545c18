"""Decode and prefill of this checkout against another one, step by step in turns: what a change of the kernels costs.

Each checkout works in a process of its own, by its own virtual environment. The two take turns every few tokens, so
that a machine whose speed drifts does so for both. A figure is the median of the ratios of neighbouring turns.

    git worktree add ../before COMMIT; make -C ../before .venv/.installed
    python benchmarks/compare_builds.py ../before --depths 0,4096,32768 --kv f16,q4,kv2

The model has random weights: four layers in the shape of SmolLM2-135M, so that depth weighs more than in the model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import command, parser, table, write_json

from kvlocal.measure.code import commit
from kvlocal.models.random import Shape, write_random_model

SHAPE = Shape("compare-builds", "llama", 4, 512, 9, 3, 64, 1536, 4096, 10000.0, 65536, tied=True)
WORKER = Path(__file__).parent / "measure" / "build_worker.py"


def start(python: Path, args: Any, model: Path, depth: int, kv: str) -> subprocess.Popen[str]:
    words = [str(python), str(WORKER), str(model), str(depth), kv, str(args.threads)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(side: subprocess.Popen[str], what: str) -> float:
    assert side.stdin and side.stdout
    print(what, file=side.stdin, flush=True)
    return float(side.stdout.readline())


def compare(args: Any, model: Path, depth: int, kv: str) -> list[dict[str, Any]]:
    sides = []
    for python in (args.other / ".venv" / "bin" / "python", Path(sys.executable)):
        sides.append(start(python, args, model, depth, kv))
        assert sides[-1].stdout and sides[-1].stdout.readline() == "ready\n", f"{python} cannot run"
    out = []
    for what, n in (("decode", args.rounds * 4), ("prefill", args.rounds)):
        for side in sides:
            turn(side, what)
        times = np.array([[turn(side, what) for side in sides[:: 1 if i % 2 else -1]] for i in range(n)])
        times[::2] = times[::2, ::-1]  # who begins takes turns as well
        ratios = times[:, 1] / times[:, 0]
        before, after = np.median(times, axis=0)
        low, high = np.percentile(ratios, [25, 75])
        row = {"kv": kv, "depth": depth, "what": what, "before_ms": float(before), "after_ms": float(after)}
        out.append(row | {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high), "turns": n})
        print(out[-1], flush=True)
    for side in sides:
        assert side.stdin
        side.stdin.close()
        side.wait()
    return out


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("other", type=Path, help="the other checkout, with its .venv")
    p.add_argument("--depths", default="0,4096,32768", help="tokens read before, comma-separated")
    p.add_argument("--kv", default="f16,q4,kv2", help="storages, comma-separated")
    p.add_argument("--rounds", type=int, default=5, help="prompt batches; four times as many turns of decoding")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(SHAPE, Path(folder) / "model.gguf")
        rows = [
            row
            for depth in map(int, args.depths.split(","))
            for kv in args.kv.split(",")
            for row in compare(args, model, depth, kv)
        ]
    header = ["storage", "depth", "what", "before, ms", "after, ms", "after / before", "middle half"]
    lines = [
        [
            row["kv"], row["depth"], row["what"], f"{row['before_ms']:.2f}", f"{row['after_ms']:.2f}",
            f"{row['ratio']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    args.other = p.get_default("other")  # where it lies says nothing
    print(f"\n{command(p, args, 'compare_builds')} OTHER at {commit()}\n\n{table(header, lines)}")
    write_json(args, rows)


if __name__ == "__main__":
    main()
