"""The file that --output-file or --plot names: checked before the measurement, which no fault of it may lose."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import click

from kvlocal.errors import KVError, UsageError


def check_output(path: Path) -> None:
    """Refuse a file that could not be written after a long measurement; nothing is left, and what is there stays.

    Raises:
        UsageError: there is no such folder, or it is a folder itself. KVError: it may not be written.
    """
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}' to write '{path.name}' to.")
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder; name a file.")
    try:
        if not path.exists():
            # not by the file itself: it may be watched for
            tempfile.TemporaryFile(dir=path.parent).close()
        elif stat.S_ISREG(path.stat().st_mode):
            path.open("ab").close()
    except OSError as error:
        raise KVError(f"'{path}' cannot be written: {error.strerror or error}; name another file.") from error


def write_output(path: Path, text: str) -> None:
    """Write what was measured; where that fails, print it, so that it is not lost.

    Raises:
        KVError: it cannot be written.
    """
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        click.echo(text, nl=False)
        raise KVError(f"'{path}' cannot be written: {error.strerror or error}; the results were printed.") from error
