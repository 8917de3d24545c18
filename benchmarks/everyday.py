"""Writes docs/everyday.md from what batch_throughput.py and plan_reality.py measured.

python benchmarks/everyday.py
"""

from __future__ import annotations

from common import ROOT
from pages.everyday import write_page


def main() -> None:
    write_page(ROOT / "benchmarks" / "results", ROOT / "docs" / "everyday.md")


if __name__ == "__main__":
    main()
