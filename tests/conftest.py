"""All tests: what this machine's user has configured must not reach them, nor the processes that they start."""

from __future__ import annotations

import os

KEPT = ("KVLOCAL_CACHE", "KVLOCAL_BENCHMARK_DATA")
"""Where the default model and the evaluation data are."""

for name in [name for name in os.environ if name.startswith("KVLOCAL_") and name not in KEPT]:
    del os.environ[name]
os.environ["KVLOCAL_CONFIG"] = os.devnull
