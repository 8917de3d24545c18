"""The parts of a split model: NAME-00001-of-00003.gguf and those that follow it."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
"""How the name of a part ends: its number, and how many there are."""


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that ``name`` is a part of; itself alone if it is none."""
    match = PART.search(name)
    if match is None:
        return [name]
    stem, count = name[: match.start()], int(match[2])
    return [f"{stem}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]


def model_parts(path: Path) -> list[Path]:
    """All files of a model; of those of a split one, the ones that are there."""
    files = [path.with_name(name) for name in part_names(path.name)]
    return [file for file in files if file == path or file.is_file()]
