"""Where models lie that were fetched or written: kvlocal's own folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

Progress = Callable[[int, "int | None", str], None]
"""Called as (bytes done, total bytes or None if unknown, label), between 0 and some ten times per second."""


def cache_dir() -> Path:
    """Return the directory for fetched models: the environment's KVLOCAL_CACHE, else the user's cache directory."""
    override = os.environ.get("KVLOCAL_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("kvlocal")


def models_dir() -> Path:
    """Where kvlocal keeps models."""
    return cache_dir() / "models"
