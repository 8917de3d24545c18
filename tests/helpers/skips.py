"""In continuous integration (``CI`` is set) a test that is skipped fails, unless its reason is one of the allowed."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

NO_KERNELS = "pages on this device have no kernels"
TAKEN_WHOLE = "an accelerator's memory is taken whole"
NO_ARCHIVE = "archives are written from main memory"
NO_GEMMA = "Gemma 3 270M is not here: kvlocal pull gemma3-270m"
ALLOWED = (
    "no SIGINT for another process there",
    "elsewhere the system may keep freed pages resident for a while",
    NO_KERNELS,
    TAKEN_WHOLE,
    NO_ARCHIVE,
    NO_GEMMA,
)
"""Reasons that a complete installation may have: they are about the operating system, the device of --device, or a
model whose terms nobody has accepted."""


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a failure of a report of something skipped."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not os.environ.get("CI"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not any(reason.endswith(allowed) for allowed in ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which continuous integration does not allow: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse(report)
    return report
