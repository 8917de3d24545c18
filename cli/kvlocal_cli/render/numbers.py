"""Measured numbers as text: bytes, rates, shares, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(n_bytes: float | None) -> str:
    """Bytes as `23.4 MiB`."""
    if n_bytes is None:
        return "n/a"
    value, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} GiB" if unit == "GiB" else f"{value:.1f} {unit}"


def rate(tokens_per_second: float | None) -> str:
    """`812 t/s`, with a decimal below 100."""
    if tokens_per_second is None:
        return "n/a"
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} t/s"


def number(value: float | None) -> str:
    """`1,034`, rounded to a whole number."""
    return "n/a" if value is None else f"{value:,.0f}"


def percent(fraction: float | None) -> str:
    """A share as `12.35%`, four digits at most."""
    return "n/a" if fraction is None else f"{100 * fraction:.4g}%"


def rounded_percent(fraction: float | None) -> str:
    """A share as `12%`."""
    return "n/a" if fraction is None else f"{fraction:.0%}"


def seconds(value: float | None) -> str:
    """`1.50 s`."""
    return "n/a" if value is None else f"{value:.2f} s"


def count(n: int, noun: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def placement(place: Mapping[str, Any]) -> str:
    """A `Placement` as `3 layers on CUDA0: portable path`."""
    return f"{count(place['n_layer'], 'layer')} on {place['device']}: {place['kernels']}"
