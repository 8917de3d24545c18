"""What a run measured; :meth:`Report.as_dict` is the object that ``--json`` prints."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil


@dataclass
class Budgeted:
    """The budget in tokens per head, as a fraction of the tokens seen, and in bytes of K and V."""

    tokens: int = 0
    fraction: float = 1.0
    bytes: int = 0


@dataclass
class Tokens:
    prompt: int = 0
    generated: int = 0
    held_mean: float = 0.0
    held_min: int = 0
    held_max: int = 0


@dataclass
class KV:
    """Bytes: what a full f16 cache would take, what is in use, what is taken from the pools, the most ever taken; and
    how much of what is in use no budget changes: sliding windows, recurrent states and the marks in them."""

    full_bytes: int = 0
    used_bytes: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0
    fixed_bytes: int = 0


@dataclass
class Reads:
    """What a retriever let tokens read: its name with its parameters; tokens per head and layer that a step read, mean
    over the steps; the share of those chosen that had been read in the step before, if any were; bytes of what stands
    for units, and seconds of choosing."""

    retriever: str
    tokens: float = 0.0
    kept: float | None = None
    index_bytes: int = 0
    choose_s: float = 0.0


@dataclass
class Archive:
    """What lies on disk: what brings it back, bytes of all sequences; of this one units written, and of these that
    cannot be read. What came back: tokens per head and layer, mean over the turns or steps, those that were asked for
    and were not there (yet), and bytes read. The last thing that went wrong, a sentence."""

    recall: str
    bytes: int = 0
    units: int = 0
    units_lost: int = 0
    recalled: float = 0.0
    missed: float = 0.0
    read_bytes: int = 0
    error: str = ""


@dataclass
class RSS:
    """Resident memory around the first eviction (``None`` if nothing was evicted) and at its peak, bytes."""

    before_evict_bytes: int | None = None
    after_evict_bytes: int | None = None
    peak_bytes: int = 0


@dataclass
class Timing:
    """Seconds and tokens per second; ``prefill_s`` excludes ``evict_s``, ``decode_s`` is the time of the answer."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tps: float = 0.0
    ttft_s: float = 0.0
    evict_s: float = 0.0
    decode_s: float = 0.0
    decode_tps: float = 0.0


@dataclass
class Report:
    text: str = ""
    model: str = ""
    policy: str = ""
    policy_args: dict[str, Any] = field(default_factory=dict)
    budget: Budgeted = field(default_factory=Budgeted)
    tokens: Tokens = field(default_factory=Tokens)
    kv: KV = field(default_factory=KV)
    reads: Reads | None = None
    archive: Archive | None = None
    rss: RSS = field(default_factory=RSS)
    timing: Timing = field(default_factory=Timing)
    finish_reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most resident memory this process ever had."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
