"""Eviction policies: which tokens are kept. One policy per file; :data:`REGISTRY` names them."""

from kvlocal.params import Parameter
from kvlocal.policies.parts.policy import Decision, Policy
from kvlocal.policies.parts.view import CacheView, LayerView
from kvlocal.policies.registry import REGISTRY, PolicyInfo, describe, find_policy, make_policy

__all__ = [
    "REGISTRY",
    "CacheView",
    "Decision",
    "LayerView",
    "Parameter",
    "Policy",
    "PolicyInfo",
    "describe",
    "find_policy",
    "make_policy",
]
