"""Which model it is: what tells one file from others, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvlocal.models.default import DEFAULT_MODEL, fetched_default
from kvlocal.models.parts import model_parts

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def fingerprint(path: Path) -> str:
    """A hash of every part of a model: its size, its first megabyte (of the first part: metadata) and samples of it."""
    digest = hashlib.sha256()
    for part in model_parts(path):
        size = part.stat().st_size
        digest.update(str(size).encode())
        with part.open("rb") as file:
            digest.update(file.read(1 << 20))
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def model_identity(spec: str | None) -> str:
    """Which model a spec of :func:`kvlocal.models.resolve.resolve_model` stands for, without fetching anything.

    The same for a file wherever it lies, and for the default model named or not; of the hub it is the spec.
    """
    path = None if spec is None or spec.startswith("hf:") else Path(spec).expanduser()
    if spec is None or (path is not None and path == fetched_default()):
        return f"{DEFAULT_MODEL.label} {DEFAULT_MODEL.gguf_sha256[:16]}"
    if path is None or not path.is_file():
        return spec
    return f"{path.name[:40]} {fingerprint(path)[:16]}".encode("utf-8", "backslashreplace").decode()
