"""All tests: the user's configuration reaches neither them nor the processes that they start; skips are counted."""

from __future__ import annotations

import os

from skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

KEPT = ("KVLOCAL_CACHE", "KVLOCAL_BENCHMARK_DATA")
"""Where the default model and the evaluation data are."""

for name in [name for name in os.environ if name.startswith("KVLOCAL_") and name not in KEPT]:
    del os.environ[name]
os.environ["KVLOCAL_CONFIG"] = os.devnull
