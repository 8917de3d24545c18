"""What an archive costs: writing a text before it is evicted, a question that recalls, and the tokens after it.

python benchmarks/archive_speed.py --depths 4096,8192,32768 --budget 1024
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, command, model_path, parser, table, write_json

from kvlocal.engine.evictor import Bounds, Evictor
from kvlocal.engine.sequence import Sequence, append
from kvlocal.measure.code import commit
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies import make_policy
from kvlocal.retrieval import make_retriever
from kvlocal.settings import RECALL_BUDGET
from kvlocal.storage.archive import Archive
from kvlocal.storage.budget import Budget

QUESTION = "What did she find behind the door in the wall, and who had hidden the key of it?"
N_WARM, N_GEN = 8, 64


class Ways:
    """A text as a policy keeps it, with an archive and without; seconds of every step that is compared."""

    def __init__(self, text: Sequence, budget: int, folder: Path) -> None:
        self.text = text
        bounds = Bounds(make_policy("streaming"), Budget.parse(str(budget)), n_ctx=2**30)
        turn = replace(bounds, archive=Archive(folder))
        reads = make_retriever("sentencekv", {"budget": budget})
        step = replace(bounds, archive=Archive(folder, recall="step"), retriever=reads)
        self.evictors = [Evictor(text.context, each) for each in (bounds, turn, step)]
        self.evict: list[list[float]] = [[], [], []]
        self.question: list[list[float]] = [[], [], []]
        self.steps: list[list[float]] = [[], [], []]
        self.bytes = self.recalled = self.read_bytes = self.missed = 0.0

    def run(self, i: int, question: list[int], rest: list[int]) -> None:
        context, evictor = self.text.context, self.evictors[i]
        branch = Sequence(context, 1)
        self.text.branch(branch)
        self.evict[i].append(_timed(lambda: evictor.after(branch, "prompt")))
        begin = len(branch.tokens)

        def ask() -> None:
            append({branch: question})
            evictor.recall(branch, begin)
            context.logits()

        self.question[i].append(_timed(ask))
        report = evictor.retrieving.archive_report(branch) if evictor.retrieving else None
        if report is not None and evictor.bounds.retriever is None:
            self.bytes, self.recalled = report.bytes, report.recalled
        evictor.choose(branch)
        evictor.reset()

        def step(token: int) -> None:
            append({branch: [token]})
            context.logits()
            evictor.choose(branch)

        for n, token in enumerate(rest):
            seconds = _timed(lambda token=token: step(token))
            if n >= N_WARM:
                self.steps[i].append(seconds)
        report = evictor.retrieving.archive_report(branch) if evictor.retrieving else None
        if report is not None and evictor.bounds.retriever is not None:
            assert not report.error
            self.read_bytes, self.missed = report.read_bytes / len(rest), report.missed
        branch.release()


def _timed(f: Any) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--depths", default="4096,8192,32768")
    p.add_argument("--budget", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--text", default="Burnett_Garden_1911.txt")
    args = p.parse_args()
    depths = sorted(map(int, args.depths.split(",")))
    model = Model(model_path(args))
    tokens = model.tokenize((args.data / "text" / args.text).read_text("utf-8"))
    question = model.tokenize(QUESTION, add_special=False)
    rows = []
    config = ContextConfig(depths[-1] + 256, n_threads=args.threads, n_seq_max=2, n_window=64)
    with Context(model, config) as context, tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        text, prefill_s = Sequence(context, 0), 0.0
        for depth in depths:
            start = time.perf_counter()
            for i in range(len(text.tokens), depth, 512):
                append({text: tokens[i : min(i + 512, depth)]}, outputs="none")
            model.llama.llama_synchronize(context.handle)
            prefill_s += time.perf_counter() - start
            ways = Ways(text, args.budget, Path(folder))
            for _ in range(args.rounds):
                for i in (0, 1, 2):
                    ways.run(i, question, tokens[depth : depth + N_WARM + N_GEN])
            write_s = float(np.median(ways.evict[1]) - np.median(ways.evict[0]))
            p50, p99 = np.percentile(ways.steps[1], [50, 99])
            by_step, by_step_p99 = np.percentile(ways.steps[2], [50, 99])
            rows.append(
                {
                    "depth": depth,
                    "prefill_s": prefill_s,
                    "write_s": write_s,
                    "write_share": write_s / prefill_s,
                    "bytes": ways.bytes,
                    "question_s": float(np.median(ways.question[0])),
                    "recall_s": float(np.median(ways.question[1])),
                    "recalled": ways.recalled,
                    "step_ms": 1000 * float(np.median(ways.steps[0])),
                    "recalled_step_ms": 1000 * p50,
                    "p99_ms": 1000 * p99,
                    "by_step_ms": 1000 * by_step,
                    "by_step_p99_ms": 1000 * by_step_p99,
                    "read_bytes": ways.read_bytes,
                    "missed": ways.missed,
                }
            )
    heads = [
        "tokens",
        "prefill s",
        "writing s",
        "of prefill",
        "on disk, MiB",
        "question s",
        "with recall s",
        "recalled",
    ]
    cells = [
        [
            *(f"{r['depth']:,}", f"{r['prefill_s']:.1f}", f"{r['write_s']:.2f}", f"{r['write_share']:.1%}"),
            *(f"{r['bytes'] / 2**20:.0f}", f"{r['question_s']:.2f}", f"{r['recall_s']:.2f}", f"{r['recalled']:.0f}"),
            *(f"{r['step_ms']:.1f}", f"{r['recalled_step_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['by_step_ms']:.1f}"),
            *(f"{r['by_step_p99_ms']:.1f}", f"{r['read_bytes'] / 2**20:.2f}", f"{r['missed']:.0f}"),
        ]
        for r in rows
    ]
    words = command(p, args, "archive_speed")
    print(f"{model.name}, {args.threads} threads, {RECALL_BUDGET.default} recalled, commit {commit()}: `{words}`\n")
    print(table([*heads, "token ms", "after recall", "p99", "by step", "p99", "read MiB", "missed"], cells))
    results = {"command": words, "model": model.name, "commit": commit(), "rows": rows}
    write_json(args, results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "archive-speed.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
