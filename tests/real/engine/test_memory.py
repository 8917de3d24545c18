"""One long document through the whole program: the memory that it says it saves is really given back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import Result, call

from kvlocal.policies import make_policy

COUNT, BYTES, NUMBER, SECONDS = int, int, (int, float), (int, float)

CONTRACT: dict[str, Any] = {
    "text": str,
    "model": str,
    "policy": str,
    "policy_args": {
        "window": int,
        "sink": int,
        "kernel": int,
        "pool": str,
        "agg": str,
        "compat": type(None),
        "alpha": float,
        "safeguard": str,
    },
    "budget": {"tokens": COUNT, "fraction": float, "bytes": BYTES},
    "tokens": {"prompt": COUNT, "generated": COUNT, "held_mean": NUMBER, "held_min": COUNT, "held_max": COUNT},
    "kv": {
        "full_bytes": BYTES,
        "used_bytes": BYTES,
        "allocated_bytes": BYTES,
        "peak_bytes": BYTES,
        "fixed_bytes": BYTES,
    },
    "reads": type(None),
    "archive": type(None),
    "rss": {"before_evict_bytes": BYTES, "after_evict_bytes": BYTES, "peak_bytes": BYTES},
    "timing": {
        "load_s": SECONDS,
        "prefill_s": SECONDS,
        "prefill_tps": NUMBER,
        "ttft_s": SECONDS,
        "evict_s": SECONDS,
        "decode_s": SECONDS,
        "decode_tps": NUMBER,
    },
    "finish_reason": str,
}


def assert_fulfils(contract: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """The same names in the same order, and every value of its type (a bool is no number)."""
    assert list(value) == list(contract)
    for name, kind in contract.items():
        if isinstance(kind, dict):
            assert_fulfils(kind, value[name])
        else:
            assert isinstance(value[name], kind) and not isinstance(value[name], bool), name


@pytest.fixture(scope="module")
def result(default_path: Path, log_text: str) -> Result:
    question = "\n\nWhat is the name of the tracked carrier?"
    options = "--policy ada-snapkv --budget 25% -n 8 --temp 0 -t 2 --json"
    return call("run", default_path, *options.split(), stdin=log_text + question)


@pytest.fixture(scope="module")
def report(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def test_stdout_is_one_json_object(result: Result, report: dict[str, Any]) -> None:
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("}\n")
    assert result.stderr == ""
    assert_fulfils(CONTRACT, report)
    defaults = make_policy("ada-snapkv")
    assert report["policy_args"] == {name: getattr(defaults, name) for name in report["policy_args"]}


def test_a_quarter_is_held(report: dict[str, Any]) -> None:
    tokens, kv = report["tokens"], report["kv"]
    assert tokens["prompt"] >= 3000
    assert 1 <= tokens["generated"] <= 8
    assert tokens["held_min"] >= 32 + tokens["generated"], "at least the window"
    assert tokens["held_min"] < tokens["held_mean"] < tokens["held_max"]
    assert tokens["held_mean"] == tokens["prompt"] // 4 + tokens["generated"]

    n_seen = tokens["prompt"] + tokens["generated"]
    assert kv["full_bytes"] % n_seen == 0
    assert kv["used_bytes"] == tokens["held_mean"] * kv["full_bytes"] // n_seen
    assert kv["used_bytes"] <= 0.27 * kv["full_bytes"]
    assert kv["used_bytes"] <= kv["allocated_bytes"] <= kv["peak_bytes"]
    # exact prefill holds the whole prompt once; beyond it there may be less than a page of 32 slots per head
    assert tokens["prompt"] <= kv["peak_bytes"] * n_seen // kv["full_bytes"] < tokens["prompt"] + 32


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system may keep freed pages resident for a while")
def test_what_was_evicted_is_given_back_to_the_system(report: dict[str, Any]) -> None:
    tokens, kv, rss = report["tokens"], report["kv"], report["rss"]
    bytes_per_token = kv["full_bytes"] // (tokens["prompt"] + tokens["generated"])
    evicted = (tokens["prompt"] - tokens["prompt"] // 4) * bytes_per_token
    assert rss["before_evict_bytes"] - rss["after_evict_bytes"] >= 0.8 * evicted
    assert rss["before_evict_bytes"] <= rss["peak_bytes"]
