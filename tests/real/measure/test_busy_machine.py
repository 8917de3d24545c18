"""The script that measures beside other work runs, and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "busy_machine.py"


def test_every_setting_has_a_row_and_every_number_of_processes_a_column(tiny_path: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "out.json"
    options = ["--model", str(tiny_path), "--busy", "0,1", "--spins", "unset,7", "--seconds", "0.05", "-r", "1"]
    options += ["--page", str(page), "-o", str(file)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text("utf-8"))["results"]["rows"]
    assert [(row["busy"], row["setting"]) for row in rows] == [(n, s) for n in (0, 1) for s in ("unset", "7", "stock")]
    assert all(row["prefill_tps"] > 0 and row["decode_tps"] > 0 for row in rows)
    text = page.read_text("utf-8")
    assert text.count("| spins | quiet | 1 busy |") == 2
    assert f"| 7 | {rows[1]['decode_tps']:.1f} ({rows[1]['decode_tps'] / rows[2]['decode_tps']:.2f}) |" in text
