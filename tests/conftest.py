"""All tests: the user's configuration reaches neither them nor the processes that they start; skips are counted; the
option --device.
"""

from __future__ import annotations

import os

import pytest
from skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

KEPT = ("KVLOCAL_CACHE", "KVLOCAL_BENCHMARK_DATA", "KVLOCAL_LIB_DIR")
"""Where the default model, the evaluation data and the native library are."""

for name in [name for name in os.environ if name.startswith("KVLOCAL_") and name not in KEPT]:
    del os.environ[name]
os.environ["KVLOCAL_CONFIG"] = os.devnull


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", metavar="NAME", help="put models on this accelerator, named as ggml does")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_kernels: pages have kernels on the device that the test runs on")
    name = config.getoption("device")
    if name:
        import devices

        try:
            devices.choose(name)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
