"""Local LLMs on llama.cpp with a bounded KV cache; :func:`load` is where scripts begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlocal.api import LLM, Conversation, load
    from kvlocal.errors import KVError, UsageError

__version__ = "0.1.0"
__all__ = ["LLM", "Conversation", "KVError", "UsageError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # numpy and the native library are loaded when they are asked for: the command's --help needs neither
    if name in ("LLM", "Conversation", "load"):
        from kvlocal import api

        return getattr(api, name)
    if name in ("KVError", "UsageError"):
        from kvlocal import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'kvlocal' has no attribute {name!r}")
