"""What is skipped in continuous integration fails there, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "helpers"

INSIDE = """
import pytest
from skips import ALLOWED

@pytest.mark.skip(reason="there is no model")
def test_marked(): pass

def test_called():
    pytest.skip("there is no model")

@pytest.fixture
def model():
    pytest.skip("there is no model")

def test_by_a_fixture(model): pass

@pytest.mark.skip(reason=ALLOWED[0])
def test_allowed(): pass

def test_good(): pass
"""


@pytest.mark.parametrize(
    ("ci", "text", "outcome"),
    [
        ("1", INSIDE, "1 failed, 1 passed, 1 skipped, 2 errors"),
        ("", INSIDE, "1 passed, 4 skipped"),
        ("1", "import pytest\npytest.importorskip('nothing_of_this_name')\n", "1 error"),
        ("", "import pytest\npytest.importorskip('nothing_of_this_name')\n", "1 skipped"),
    ],
)
def test_a_skip_fails_in_continuous_integration(ci: str, text: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "test_inside.py").write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider", "test_inside.py"],
        cwd=tmp_path,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome in done.stdout, done.stdout + done.stderr
    assert (done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)) == (not ci)
    assert ("which continuous integration does not allow" in done.stdout) == bool(ci)
