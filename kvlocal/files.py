"""Files that are replaced at once or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of these parts, or leave the one that is there as it was; a new one is readable by its owner only.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()  # of a link, what it points to
    mode = path.stat().st_mode if path.exists() else None
    # in the same directory: a replacement is atomic only within a file system
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
