"""Whether a stand-in in a test can be called as the real thing is, and has no attribute that the real one lacks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def disagreement(fake: Callable[..., Any], real: Callable[..., Any]) -> str:
    """What a caller of one would trip over in the other; empty if nothing. An unused parameter may begin with ``_``."""
    fakes, reals = dict(inspect.signature(fake).parameters), dict(inspect.signature(real).parameters)
    if next(iter(reals), "") == "self" and next(iter(fakes), "").isidentifier():
        del reals["self"], fakes[next(iter(fakes))]  # a function may call it by another name
    named = {name.lstrip("_"): p for name, p in fakes.items() if p.kind not in _VARIABLE}
    takes = {p.kind for p in fakes.values()}
    for name, p in named.items():
        other = reals.get(name) or reals.get(f"_{name}")
        if other is None:
            return f"it has no parameter {name!r}"
        if (p.kind is p.KEYWORD_ONLY) != (other.kind is other.KEYWORD_ONLY):
            return f"{name!r} is {other.kind.description} there"
        if p.default is not p.empty and (other.default is other.empty or other.default != p.default):
            return f"the default of {name!r} is not {p.default!r} there"
    for name, other in reals.items():
        variable = inspect.Parameter.VAR_KEYWORD if other.kind is other.KEYWORD_ONLY else _VARIABLE[0]
        needed = other.default is other.empty and other.kind not in _VARIABLE
        if needed and name.lstrip("_") not in named and variable not in takes and _VARIABLE[1] not in takes:
            return f"it needs {name!r}"
    places = [name for name, p in named.items() if p.kind is not p.KEYWORD_ONLY]
    order = [name.lstrip("_") for name, p in reals.items() if p.kind not in (p.KEYWORD_ONLY, *_VARIABLE)]
    return "" if order[: len(places)] == places else f"its parameters stand in the order {order}"


def names(cls: type) -> set[str]:
    """Public attributes of a class and of its instances: what is defined in it, annotated, or set on ``self``."""
    found = set(dir(cls))
    for base in cls.__mro__[:-1]:
        found |= set(vars(base).get("__annotations__", {}))
        found |= set(re.findall(r"self\.(\w+)\b[^\n=(]*(?:: [^\n=]+)?=[^=]", inspect.getsource(base)))
    return {name for name in found if not name.startswith("_")}


def disagreements(fake: type, real: type, own: set[str]) -> list[str]:
    """What the fake has and the real class has not, or takes otherwise; ``own``: what only tests use."""
    out = [f"{name}: not there" for name in sorted(names(fake) - own - names(real))]
    for name, method in vars(fake).items():
        other = getattr(real, name, None)
        shared = callable(method) and callable(other) and not name.startswith("__") and name not in own
        if shared and (trouble := disagreement(method, other)):
            out.append(f"{name}: {trouble}")
    return out
