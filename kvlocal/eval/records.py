"""What an evaluation measured: a record per case and variant, kept on disk as they come, and the rows of the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from kvlocal.eval.scores import interval
from kvlocal.measure.code import code_digest, commit, policy_digest
from kvlocal.measure.variants import Variant
from kvlocal.models.parts import model_parts

MEASURES = {"kld": "kl", "ppl": "ppl_ratio"}
"""The measure of each metric that has a confidence interval; ``score`` for all others."""

QUESTIONS = ("inside", "after")
"""Whether the eviction sees the question: asked with the document, or after it was evicted."""


@dataclass(frozen=True)
class Record:
    """One case under one variant.

    Attributes:
        metric: ``kld``, ``ppl``, ``needle``, …; task: what is averaged; case: the case's id.
        question: ``inside`` or ``after``, empty where nothing is asked.
        reads: the retriever, empty if everything is read.
        recalls: what an archive brings back, empty if nothing.
        held_mean: tokens held per layer and KV head after the eviction; used_bytes: their K and V.
        full_bytes: what a full f16 cache of the same text takes.
        evict_s: time of the evictions.
        measures: the results by name.
        labels: what is known of the case, such as a needle's depth.
        answer: the text that was scored.
        commit: of the source that measured it, its version where that is not known; :class:`Store` fills it in.
    """

    metric: str
    task: str
    case: str
    policy: str
    policy_args: Mapping[str, Any]
    storage: str
    budget: str
    prefill: str
    guide: int
    question: str
    held_mean: float
    used_bytes: int
    full_bytes: int
    evict_s: float
    measures: Mapping[str, float]
    labels: Mapping[str, float | str] = field(default_factory=dict)
    answer: str = ""
    commit: str = ""
    reads: str = ""
    recalls: str = ""


def identity(variant: Variant) -> dict[str, Any]:
    """What tells a variant from others, as the fields of a :class:`Record`."""
    policy = variant.policy
    return {
        "policy": variant.name,
        "policy_args": asdict(policy) if is_dataclass(policy) else {},
        "storage": variant.storage,
        "budget": str(variant.budget),
        "prefill": variant.prefill,
        "guide": variant.guide,
        "reads": str(variant.retriever or ""),
        "recalls": variant.recalls,
    }


def variant_key(variant: Variant) -> dict[str, Any]:
    """All of a variant that a result depends on: its identity, and the code of a policy that is not of this package."""
    return identity(variant) | {"code": policy_digest(variant.policy)}


def digest(*parts: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha1(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


class Store:
    """Records on disk, by key: what was measured once with the same model, code and settings is not measured again.

    A line is written and flushed per record, so an interrupted run loses the case it was at and nothing else.

    ``fresh``: what is there is not read; what is measured anew takes its place.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text("utf-8").splitlines() if path.exists() and not fresh else []:
            try:
                values = json.loads(line)
                key = values.pop("key")
                self._records[key] = Record(**values)
            except (ValueError, TypeError, KeyError):
                continue  # cut short by an interruption, or of another version
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def put(self, key: str, record: Record) -> None:
        record = replace(record, commit=commit())
        self._records[key] = record
        self._file.write(json.dumps({"key": key} | asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()


def store_path(model: Path, metric: str, settings: Mapping[str, Any]) -> Path:
    """Where the records of a model, a metric and settings are kept: in the user's cache folder.

    The name changes with the files of the model and with every byte of this package and its native library.
    """
    stats = [path.stat() for path in model_parts(model)]
    files = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    name = digest(str(model.resolve()), files, metric, settings, code_digest())
    return Path(platformdirs.user_cache_dir("kvlocal")) / "eval" / f"{metric}-{name}.jsonl"


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The table: per task, variant and question the mean of every measure, with a 95 % interval of the main one.

    With more than one task, a task ``all`` is the mean over all cases. ``held`` is the share of a full cache's bytes.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    tasks: dict[str, None] = {}
    for record in records:
        tasks.setdefault(record.task)
        args = json.dumps(record.policy_args, sort_keys=True)
        kept = (record.policy, args, record.storage, record.budget, record.prefill, record.guide)
        variant = (*kept, record.reads, record.recalls, record.question)
        for task in (record.task, ""):
            groups.setdefault((record.metric, task, *variant), []).append(record)
    names = [*tasks] if len(tasks) == 1 else [*tasks, ""]
    return [_row(task or "all", found) for task in names for key, found in groups.items() if key[1] == task]


def _row(task: str, records: Sequence[Record]) -> dict[str, Any]:
    first = records[0]
    main = MEASURES.get(first.metric, "score")

    def mean(values: Iterable[float]) -> float:
        found = list(values)
        return sum(found) / len(found)

    low, high = interval([r.measures[main] for r in records])
    return {
        "metric": first.metric,
        "task": task,
        "policy": first.policy,
        "policy_args": dict(first.policy_args),
        "storage": first.storage,
        "budget": first.budget,
        "prefill": first.prefill,
        "guide": first.guide,
        "reads": first.reads,
        "recalls": first.recalls,
        "question": first.question,
        "held_tokens": mean(r.held_mean for r in records),
        "used_bytes": mean(r.used_bytes for r in records),
        "full_bytes": mean(r.full_bytes for r in records),
        "held": mean(r.used_bytes / r.full_bytes for r in records),
        "evict_s": mean(r.evict_s for r in records),
        **{name: mean(r.measures[name] for r in records) for name in first.measures},
        "ci_low": low,
        "ci_high": high,
        "n": len(records),
        "commit": ", ".join(dict.fromkeys(r.commit for r in records)),
    }
