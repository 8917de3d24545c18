"""Speed beside other work: prefill and decode while other processes keep the machine busy, by how long threads spin.

OpenMP reads the setting while it is loaded, so each runs in a process of its own; settings take turns, round by round.
Stock is llama.cpp's own cache with the setting that OpenMP has by itself.

    python benchmarks/busy_machine.py              # writes docs/busy-machine.md
    python benchmarks/busy_machine.py -t 4 --spins unset,1000 --busy 0,2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, command, model_path, parser, table, write_json

from kvlocal.engine.engine import Engine, EngineConfig
from kvlocal.measure.code import commit
from kvlocal.measure.machine import cpu_name
from kvlocal.native.sampling import Sampling
from kvlocal.native.spinning import SPINS
from kvlocal.native.threads import usable_cores
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

UNSET = "unset"
STOCK = "stock"
PIECE, MOST = 128, 3072
"""Tokens that are read at once, and in all."""


def measure(path: Path, policy: str, n_threads: int, seconds: float) -> dict[str, float]:
    """Tokens per second of prefill and of decode, each for so many seconds, at least one piece and one token."""
    config = EngineConfig(path, make_policy(policy), Budget.parse("2048"), n_ctx=8192, n_threads=n_threads)
    with Engine(config) as engine:
        words = engine.tokenize("The survey crossed the plateau in rain, and nobody wrote anything down. " * 20)
        tokens = (words * PIECE)[:PIECE]
        engine.prefill(tokens[:16])  # buffers are made
        n, start = 0, time.perf_counter()
        while n < MOST and (n == 0 or time.perf_counter() - start < seconds):
            engine.prefill(tokens)
            n += len(tokens)
        prefill = n / (time.perf_counter() - start)
        answer = engine.generate(MOST, Sampling(temp=0.0, ignore_eos=True))
        next(answer)
        before, start = len(engine.sequences[0].tokens), time.perf_counter()
        for _ in answer:
            if time.perf_counter() - start >= seconds:
                break
        decode = (len(engine.sequences[0].tokens) - before) / (time.perf_counter() - start)
        answer.close()
    return {"prefill_tps": prefill, "decode_tps": decode}


@contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.terminate()
        for other in others:
            other.wait()


def in_a_process(args: argparse.Namespace, path: Path, name: str) -> dict[str, float]:
    """:func:`measure` with one setting: a number of spins, ``unset``, or ``stock``."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if name.isdecimal():
        env["GOMP_SPINCOUNT"] = name
    words = [sys.executable, __file__, "--worker", name, "--model", str(path)]
    words += ["-t", str(args.threads), "--seconds", str(args.seconds)]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def worker(args: argparse.Namespace) -> None:
    if not args.worker.isdecimal():
        # loaded before kvlocal does it, it keeps to itself
        ctypes.CDLL("libgomp.so.1")
    policy = "full" if args.worker == STOCK else "ladder"
    print(json.dumps(measure(Path(args.model), policy, args.threads, args.seconds)))


def rows_of(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """The median of every setting beside every number of busy processes."""
    names = [*args.spins.split(","), STOCK]
    rows = []
    for n_busy in map(int, args.busy.split(",")):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        with busy(n_busy):
            for _ in range(args.rounds):
                for name in names:
                    found[name].append(in_a_process(args, path, name))
                    print(n_busy, name, found[name][-1], file=sys.stderr, flush=True)
        for name in names:
            medians = {key: statistics.median(run[key] for run in found[name]) for key in found[name][0]}
            rows.append({"busy": n_busy, "setting": name, **medians})
    return rows


def page(rows: list[dict[str, Any]], args: argparse.Namespace, line: str, model: str) -> str:
    """The Markdown page; every number is computed from the rows."""
    numbers = sorted({row["busy"] for row in rows})
    at = {(row["busy"], row["setting"]): row for row in rows}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    parts = [
        f"""# Beside other work

Written by `{line}`; nothing here is typed by hand. {model}, {args.threads} threads,
{usable_cores().reason}: {cpu_name()}. Medians; rounds: {args.rounds}. Measured at commit
{commit()}.

Threads that compute wait for each other after every operator, and spin meanwhile. Where another process wants the
processor, the thread that is waited for may be the one that does not get it. Columns are numbers of other processes
that keep a core busy each. Rows are values of `GOMP_SPINCOUNT`, with the default policy, ladder: kvlocal sets {SPINS},
`unset` is what OpenMP does by itself. `stock` is llama.cpp's own cache (`--policy full`) with nothing set. In brackets:
times the speed of stock beside as many processes.
"""
    ]
    for title, key in (("Decode, tokens/s", "decode_tps"), ("Prefill, tokens/s", "prefill_tps")):
        body = [
            [name, *(f"{at[n, name][key]:.1f} ({at[n, name][key] / at[n, STOCK][key]:.2f})" for n in numbers)]
            for name in settings
        ]
        parts.append(f"## {title}\n\n{table(['spins', *(f'{n} busy' if n else 'quiet' for n in numbers)], body)}\n")
    return "\n".join(parts)


def main() -> None:
    p = parser(__doc__ or "")
    p.set_defaults(threads=2)
    p.add_argument("--busy", default="0,1,2,4", help="numbers of busy processes")
    p.add_argument("--spins", default=f"{UNSET},0,100,1000,10000", help="values of GOMP_SPINCOUNT")
    p.add_argument("--seconds", type=float, default=1.5, help="of prefill, and of decode, per process")
    p.add_argument("-r", "--rounds", type=int, default=2)
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "busy-machine.md")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        worker(args)
        return
    path = model_path(args)
    rows = rows_of(args, path)
    line = command(p, argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "page"}), "busy_machine")
    args.page.write_text(page(rows, args, line, path.stem), "utf-8")
    write_json(args, {"command": line, "rows": rows})


if __name__ == "__main__":
    main()
