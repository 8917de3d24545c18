"""The policies by name, those of the user included."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points

from kvlocal.errors import UsageError
from kvlocal.params import Parameter, closest, parameters, values_of
from kvlocal.policies.ada_pyramid import AdaPyramid
from kvlocal.policies.ada_snapkv import AdaSnapKV
from kvlocal.policies.buzz import Buzz
from kvlocal.policies.cascading import Cascading
from kvlocal.policies.chunkkv import ChunkKV
from kvlocal.policies.corm import Corm
from kvlocal.policies.expected_attention import ExpectedAttention
from kvlocal.policies.full import Full
from kvlocal.policies.h2o import H2O
from kvlocal.policies.keydiff import KeyDiff
from kvlocal.policies.knorm import Knorm
from kvlocal.policies.ladder import Ladder
from kvlocal.policies.observed import Observed
from kvlocal.policies.parts.policy import Policy
from kvlocal.policies.pyramidkv import PyramidKV
from kvlocal.policies.random import Random
from kvlocal.policies.sentencekv import SentenceKV
from kvlocal.policies.snapkv import SnapKV
from kvlocal.policies.streaming import Streaming
from kvlocal.policies.tova import Tova

REGISTRY: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        *(Full, Ladder, Streaming, Cascading),
        *(SnapKV, PyramidKV, AdaSnapKV, AdaPyramid, SentenceKV),
        *(Buzz, H2O, Tova, Corm, Observed, ExpectedAttention, ChunkKV, KeyDiff, Knorm, Random),
    )
}


@dataclass(frozen=True)
class PolicyInfo:
    """One policy as a row of the table ``kvlocal policies``."""

    name: str
    paper: str
    parameters: tuple[Parameter, ...]
    summary: str


def find_policy(name: str, here: bool = True) -> type[Policy]:
    """The class that a name stands for; see :func:`make_policy`.

    Raises:
        UsageError: there is none, or it is not a policy.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    plugins = {point.name: point.value for point in entry_points(group="kvlocal.policies")}
    target = name if ":" in name else plugins.get(name)
    if target is None:
        known = [*REGISTRY, *sorted(plugins)]
        raise UsageError(
            f"There is no policy {name!r}{closest(name, known)}; known policies: {', '.join(known)}. "
            "A policy of your own is package.module:Class."
        )
    module, _, attribute = target.partition(":")
    try:
        with _importable(here and ":" in name):
            cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the code of the module raises
        kind = "" if isinstance(error, ImportError | AttributeError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"The policy {name!r} cannot be loaded from {target!r}: {kind}{error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, Policy) and dataclasses.is_dataclass(cls)):
        raise UsageError(
            f"{target!r} is not a policy: it must be a dataclass that derives from kvlocal.policies.Policy."
        )
    return cls


@contextmanager
def _importable(here: bool) -> Iterator[None]:
    """With ``here``, modules in the working directory can be imported for now; ``sys.path`` is as before after that,
    whatever they did to it."""
    path, before = sys.path, list(sys.path)
    if here:
        path.append(os.getcwd())
    try:
        yield
    finally:
        path[:] = before
        sys.path = path


def make_policy(name: str, args: Mapping[str, object] | None = None, here: bool = True) -> Policy:
    """Builds a policy from its name and hyper-parameters; text is converted to the type of the field.

    ``name`` is one of :data:`REGISTRY`, of an installed package's entry points in the group ``kvlocal.policies``, or
    ``package.module:Class``; with ``here`` its module may lie in the working directory.

    Raises:
        UsageError: unknown policy, unknown parameter or a value that is not allowed.
    """
    cls = find_policy(name, here)
    return cls(**values_of(cls, args or {}))


def describe() -> list[PolicyInfo]:
    """All policies in registry order: name, paper, parameters with defaults, summary."""
    return [
        PolicyInfo(name, cls.paper, tuple(parameters(cls)), (cls.__doc__ or "").strip().splitlines()[0])
        for name, cls in REGISTRY.items()
    ]
