"""The command as a user runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# nothing here takes long; a process that hangs should not take the whole suite with it
TIMEOUT_S = 300

COMMAND = (sys.executable, "-m", "kvlocal")


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tests' environment, without what would make the output depend on a terminal."""
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return plain | {"COLUMNS": "80", "PYTHONUTF8": "1"} | dict(extra or {})


def call(*arguments: object, stdin: str = "", env: Mapping[str, str] | None = None) -> Result:
    """``python -m kvlocal`` with these arguments; standard input is a pipe."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        env=environment(env),
        timeout=TIMEOUT_S,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))
