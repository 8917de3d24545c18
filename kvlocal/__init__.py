"""Local LLMs on llama.cpp with a bounded KV cache; :func:`load` is where scripts begin."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlocal.api import LLM, Conversation, load
    from kvlocal.errors import KVError, UsageError
    from kvlocal.policies import CacheView, Decision, LayerView, Policy

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CacheView",
    "Conversation",
    "Decision",
    "KVError",
    "LayerView",
    "Policy",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "kvlocal.api": ("LLM", "Conversation", "load"),
    "kvlocal.errors": ("KVError", "UsageError"),
    "kvlocal.policies": ("CacheView", "Decision", "LayerView", "Policy"),
}


def __getattr__(name: str) -> Any:
    # numpy and the native library are loaded when they are asked for: the command's --help needs neither
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'kvlocal' has no attribute {name!r}")
