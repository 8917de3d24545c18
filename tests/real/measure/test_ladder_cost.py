"""The script that measures what the ladder costs runs, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "ladder_cost.py"


def test_the_decision_and_the_eviction_are_measured(tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ["--model", str(tiny_path), "--prompt", "700", "-r", "2", "-t", "1", "-o", str(file)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text("utf-8"))["results"]
    assert found["decide_s"] > 0 and found["evict_s"] > 0 and found["prompt_s"] > 0
    assert f"{found['decide_s']:.3f} s" in done.stdout and "700 tokens read" in done.stdout
