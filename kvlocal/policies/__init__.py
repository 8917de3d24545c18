"""Eviction policies: which tokens are kept. One policy per file; :data:`REGISTRY` names them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvlocal.errors import UsageError
from kvlocal.policies.ada_pyramid import AdaPyramid
from kvlocal.policies.ada_snapkv import AdaSnapKV
from kvlocal.policies.base import CacheView, LayerView, Policy
from kvlocal.policies.full import Full
from kvlocal.policies.params import Parameter, declared_rules, parameters, refusal
from kvlocal.policies.pyramidkv import PyramidKV
from kvlocal.policies.snapkv import SnapKV
from kvlocal.policies.streaming import Streaming

REGISTRY: dict[str, type[Policy]] = {
    cls.name: cls for cls in (Full, Streaming, SnapKV, PyramidKV, AdaSnapKV, AdaPyramid)
}


@dataclass(frozen=True)
class PolicyInfo:
    """One policy as a row of the table ``kvlocal policies``."""

    name: str
    paper: str
    parameters: tuple[Parameter, ...]
    summary: str


def make_policy(name: str, args: Mapping[str, object] | None = None) -> Policy:
    """Builds a policy from its name and hyper-parameters; text is converted to the type of the field.

    Raises:
        UsageError: unknown policy, unknown parameter or a value that is not allowed.
    """
    cls = REGISTRY.get(name)
    if cls is None:
        raise UsageError(
            f"There is no policy {name!r}{_closest(name, REGISTRY)}; known policies: {', '.join(REGISTRY)}."
        )
    rules = declared_rules(cls)
    values: dict[str, object] = {}
    for key, value in (args or {}).items():
        if key not in rules:
            known = f"it has {', '.join(rules)}" if rules else "it has none at all"
            raise UsageError(f"Policy {name} has no parameter {key!r}{_closest(key, rules)}; {known}.")
        if isinstance(value, str):
            try:
                value = rules[key].parse(value)
            except ValueError:
                raise refusal(name, key, value, rules[key]) from None
        values[key] = value
    return cls(**values)


def describe() -> list[PolicyInfo]:
    """All policies in registry order: name, paper, parameters with defaults, summary."""
    return [
        PolicyInfo(name, cls.paper, tuple(parameters(cls)), (cls.__doc__ or "").strip().splitlines()[0])
        for name, cls in REGISTRY.items()
    ]


def _closest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


__all__ = ["REGISTRY", "CacheView", "LayerView", "Parameter", "Policy", "PolicyInfo", "describe", "make_policy"]
