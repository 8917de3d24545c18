"""A measurement of `kvlocal eval` that is made up: its records, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlocal_cli.backend import eval as backend

from kvlocal.eval.evaluation import Step
from kvlocal.eval.records import Record

MIB = 2**20
MACHINE = {"cpu": "Fast Chip 9", "cores": 4, "threads": 1, "read_bytes_per_s": 12.34e9}
ROUGE = {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375, "score": 0.375}
KLD = {"kl": 0.25, "floor": 1.5e-5, "top1": 0.875, "ppl": 20.0, "ppl_ratio": 1.5}


def found(
    policy: str, measures: dict[str, float], *, metric: str = "needle", case: int = 0, question: str = "", **fields: Any
) -> Record:
    """A record of a case: a quarter is held, or everything."""
    whole = policy in ("full", "paged")
    values: dict[str, Any] = {
        "task": f"{metric}-task",
        "policy_args": {} if whole else {"window": 8},
        "storage": "f16",
        "budget": "100%" if whole else "25%",
        "prefill": "exact",
        "guide": 0,
        "reads": "",
        "recalls": "",
        "held_mean": 400.0 if whole else 100.0,
        "used_bytes": 4 * MIB if whole else MIB,
        "full_bytes": 4 * MIB,
        "evict_s": 0.0 if whole else 0.5,
        "labels": {"length": 400, "depth": 0.5},
    }
    return Record(metric, case=f"case/{case}", policy=policy, question=question, measures=measures, **values | fields)


TEXTS = [
    found("paged", KLD | {"kl": 0.0, "floor": 0.0, "top1": 1.0, "ppl_ratio": 1.0}, metric="kld"),
    found("snapkv", KLD, metric="kld"),
    found("snapkv", KLD | {"kl": 0.5, "top1": 0.625, "ppl_ratio": 1.0}, metric="kld", case=1),
]
NEEDLES = [
    found(policy, {"score": score}, case=case, question=question)
    for policy, question, scores in (
        ("paged", "inside", (1.0, 1.0)),
        ("snapkv", "inside", (1.0, 1.0)),
        ("paged", "after", (1.0, 1.0)),
        ("snapkv", "after", (0.5, 0.5)),
    )
    for case, score in enumerate(scores)
]


@dataclass
class FakeEval:
    """What was asked for, and what comes of it: `fault` runs before the record with this number."""

    records: Sequence[Record] = field(default_factory=lambda: NEEDLES)
    fault: Callable[[], None] | None = None
    fault_at: int = 1
    model: str | None = None
    path: Path | None = None
    plan: Any = None
    n_gpu_layers: int = -1
    fresh: bool = False
    log: list[str] = field(default_factory=list)

    def find_model(self, settings: Any, random: str | None, _screen: Any) -> Path:
        assert random is None
        self.model = settings.model
        self.log.append("find")
        return Path("found.gguf")

    def f32_model(self, path: Path, _screen: Any) -> Path:
        self.log.append("copy")
        return path.with_suffix(".f32")

    @contextmanager
    def open_eval(
        self, path: Path, plan: Any, n_gpu_layers: int, fresh: bool, _screen: Any
    ) -> Iterator[backend.Evaluation]:
        self.path, self.plan, self.n_gpu_layers, self.fresh = path, plan, n_gpu_layers, fresh
        self.log.append("open")
        try:
            yield backend.Evaluation("tiny", self.run)
        finally:
            self.log.append("close")

    def run(self, on_step: Any) -> Iterator[Record]:
        for i, record in enumerate(self.records):
            if self.fault is not None and i == self.fault_at:
                self.fault()
            on_step(Step(i, len(self.records), record.case))
            yield record
