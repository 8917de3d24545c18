"""Shared by the benchmarks: data, log-probabilities, greedy answers from a branch."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvlocal.measure.code import commit
from kvlocal.models.resolve import resolve_model
from kvlocal.native.context import Context
from kvlocal.native.threads import default_threads, usable_cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("KVLOCAL_BENCHMARK_DATA", ROOT.parent / "shared" / "data"))


def parser(doc: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--model", default=None, help="GGUF file or hf:USER/REPO (default: the default model)")
    out.add_argument("--data", type=Path, default=DATA, help="evaluation data")
    out.add_argument("-t", "--threads", type=int, default=default_threads())
    out.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    return out


def command(p: argparse.ArgumentParser, args: argparse.Namespace, script: str) -> str:
    """The command that measures the same: what was given another value than the default, files by their name alone.

    Where data lies, what is written where, and threads change nothing in what is measured.
    """
    words = [f"python benchmarks/{script}.py"]
    for name, value in vars(args).items():
        if name not in ("data", "output", "threads") and value != p.get_default(name):
            words.append(f"--{name.removeprefix('n_')} {Path(value).name if name == 'model' else value}")
    return " ".join(words)


def model_path(args: argparse.Namespace) -> Path:
    return resolve_model(args.model)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) per position, nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(-1)


def greedy(context: Context, seq: int, first: int, n: int) -> list[int]:
    """Up to n tokens of sequence ``seq``, of which ``first`` is already chosen; ends at an end token."""
    out: list[int] = []
    token, pos = first, context.n_seen(seq)
    while len(out) < n and not context.model.is_end(token):
        out.append(token)
        context.decode([token], pos, seq)
        pos += 1
        token = int(context.logits()[0].argmax())
    return out


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [list(header), *([str(c) for c in row] for row in rows)]
    text = ["| " + " | ".join(row) + " |" for row in lines]
    text.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(text)


def at_commit(commits: Mapping[str, str]) -> str:
    """A sentence that says at which commit every part was measured; what was written before that was kept has none."""
    parts = {name: found or "not recorded" for name, found in commits.items()}
    if len(set(parts.values())) == 1:
        return f"Measured at commit {next(iter(parts.values()))}."
    return f"Measured at commit: {', '.join(f'{name} {found}' for name, found in parts.items())}."


def write_json(args: argparse.Namespace, results: Any) -> None:
    if args.output:
        cpu = platform.processor() or platform.machine()
        machine = {"cpu": cpu, "cores": usable_cores().physical, "threads": args.threads}
        values = {"machine": machine, "commit": commit(), "results": results}
        args.output.write_text(json.dumps(values, indent=1) + "\n")
