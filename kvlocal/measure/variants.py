"""The variants of a benchmark: every combination of policy, storage, budget and prefill mode."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvlocal.engine.config import check_kernels
from kvlocal.errors import UsageError
from kvlocal.params import declared_rules
from kvlocal.policies import Policy, make_policy
from kvlocal.policies.full import Full
from kvlocal.retrieval import Retriever, make_retriever
from kvlocal.storage.archive import ASKING, Archive
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

Prefill = Literal["exact", "chunked"]

PAGED = "paged"
"""The name of our cache and kernels with nothing evicted; ``full`` is llama.cpp's own cache."""

StockStorage = Literal["f16", "q8", "q4"]
STOCK_STORAGES: tuple[StockStorage, ...] = ("f16", "q8", "q4")
"""What ``full`` can be stored in."""

_ALL = Budget.parse("100%")


@dataclass(frozen=True)
class Variant:
    """One way to keep a text; ``full`` (llama.cpp's cache) and :data:`PAGED` (ours) always keep 100%."""

    name: str
    policy: Policy
    budget: Budget
    storage: str = "f16"
    prefill: Prefill = "exact"
    guide: int = 0
    retriever: Retriever | None = None
    archive: Archive | None = None

    @property
    def paged(self) -> bool:
        return self.name == PAGED or self.policy.evicts

    @property
    def store(self) -> Storage:
        """The storage of the tokens that it keeps."""
        return Storage.parse(self.storage)

    @property
    def demotes(self) -> bool:
        """Whether tokens are demoted; llama.cpp's cache has them in its type from the start."""
        return self.paged and self.store.demotes

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats beside f16 that our cache must be able to store for it."""
        return (self.policy.formats or self.store.formats) if self.paged else ()

    @property
    def rotates(self) -> bool:
        """Whether our cache must rotate keys and values for it."""
        return self.paged and (bool(self.policy.formats) or self.store.rotates)

    @property
    def n_window(self) -> int:
        """Queries that our cache must remember for it."""
        asking = self.retriever.n_queries if self.retriever else ASKING if self.archive else 0
        return max(self.policy.n_window, self.guide, asking)

    @property
    def recalls(self) -> str:
        """What it brings back from its archive, such as ``512 turn``; empty: nothing."""
        if self.archive is None or self.archive.recall == "off":
            return ""
        return f"{self.archive.budget} turn" if self.archive.recall == "turn" else "step"

    @property
    def type_kv(self) -> StockStorage:
        """The type that llama.cpp's cache is made in."""
        return "f16" if self.paged else self.storage  # type: ignore[return-value]

    @property
    def chunked(self) -> bool:
        return self.policy.evicts and self.prefill == "chunked"

    @property
    def label(self) -> str:
        """A short name that tells it from the others, such as ``ada-snapkv 25% chunked``."""
        parts = [self.name, str(self.budget) if self.policy.evicts else "", "chunked" if self.chunked else ""]
        parts.append(f"guide {self.guide}" if self.guide else "")
        parts.append(f"reads {self.retriever}" if self.retriever else "")
        parts.append(f"recalls {self.recalls}" if self.archive else "")
        return " ".join(filter(None, [*parts, self.storage if self.storage != "f16" else ""]))


def expand(
    names: Sequence[str],
    policy_args: Mapping[str, str],
    budgets: Sequence[str],
    storages: Sequence[str] = ("f16",),
    prefills: Sequence[Prefill] = ("exact",),
    guides: Sequence[int] = (0,),
    here: bool = True,
    retrievers: Sequence[Retriever | None] = (None,),
    archives: Sequence[Archive | None] = (None,),
) -> tuple[Variant, ...]:
    """All combinations, by policy, storage, budget, prefill, guide, retriever, archive; what does not evict appears
    once per storage, retriever and archive.

    An archive of which turns recall goes to those that read everything, one of which steps do to the others. ``full``
    exists in :data:`STOCK_STORAGES` only, and reads everything. ``policy_args`` go to the policies that have
    such a parameter; a guide to chunked prefill of those that look at attention scores. ``here``: as of
    :func:`kvlocal.policies.make_policy`.

    Raises:
        UsageError: unknown policy, budget or storage; a parameter that no policy has; a budget in tokens below what
            its policy needs; only ``full``, and only in storages that it does not exist in.
    """
    for storage in storages:
        Storage.parse(storage)  # says which there are
    parsed = [Budget.parse(text) for text in budgets]
    policies = _policies(names, policy_args, here)
    if policies.keys() == {"full"} and storages and not set(storages) & set(STOCK_STORAGES):
        raise UsageError(
            f"'full' is llama.cpp's own cache, which is never stored in {' or '.join(storages)}; "
            f"give {', '.join(STOCK_STORAGES)}, or the policy '{PAGED}'."
        )
    out: list[Variant] = []
    for name, policy in policies.items():
        of_policy = parsed if policy.evicts else [_ALL]
        choices = itertools.product(storages, of_policy, prefills, guides, retrievers, archives)
        for storage, budget, prefill, guide, retriever, archive in choices:
            if not policy.evicts and name != PAGED and storage not in STOCK_STORAGES:
                continue
            if policy.formats:
                storage = "f16"  # it says itself how tokens are stored
            if policy.evicts and budget.unit == "tokens":
                budget.tokens(0, 1, policy.min_budget)
            variant = Variant(name, policy, budget, storage, prefill if policy.evicts else "exact")
            if variant.paged and not policy.rolls:
                own = make_retriever(policy.reads) if policy.reads else None
                variant = replace(variant, retriever=retriever or own)
                if archive is not None and (variant.retriever is None) == (archive.recall == "turn"):
                    variant = replace(variant, archive=archive)
            if variant.chunked and "scores" in policy.needs:
                variant = replace(variant, guide=guide)
            if variant not in out:
                out.append(variant)
    return tuple(out)


NO_RETRIEVER = "none"
"""The name of reading everything."""


def retrievers(names: Sequence[str], args: Mapping[str, str], budgets: Sequence[int]) -> tuple[Retriever | None, ...]:
    """Every retriever with every budget; ``args`` go to those that have such a parameter.

    Raises:
        UsageError: unknown retriever, a parameter that none has, a budget that one cannot read with.
    """
    out: dict[Retriever | None, None] = {}
    unused = set(args)
    for name in names:
        if name == NO_RETRIEVER:
            out[None] = None
            continue
        rules = declared_rules(type(make_retriever(name)))
        for budget in budgets:
            own = {key: value for key, value in args.items() if key in rules}
            out[make_retriever(name, {"budget": budget, **own})] = None
        unused -= rules.keys()
    if unused:
        raise UsageError(f"None of the retrievers {', '.join(names)} has a parameter {min(unused)!r}.")
    return tuple(out)


def archives(where: str, budgets: Sequence[int]) -> tuple[Archive | None, ...]:
    """None, and unless ``where`` is ``off`` archives there of which turns recall so many tokens, or every step."""
    found = [Archive.parse(where, budget=budget) for budget in budgets]
    by_step = Archive.parse(where, by_step=True)
    return tuple(dict.fromkeys([None, *found, by_step]))


def check_variants(kernels: str, variants: Sequence[Variant]) -> None:
    """Refuses what only the page kernels can compute; see :func:`kvlocal.engine.config.check_kernels`."""
    for variant in variants:
        if variant.paged:
            check_kernels(kernels, variant.policy, variant.store)


def _policies(names: Sequence[str], args: Mapping[str, str], here: bool) -> dict[str, Policy]:
    out: dict[str, Policy] = {}
    unused = set(args)
    for name in names:
        if name == PAGED:
            out[name] = Full()
            continue
        rules = declared_rules(type(make_policy(name, here=here)))
        out[name] = make_policy(name, {key: value for key, value in args.items() if key in rules}, here)
        unused -= rules.keys()
    if unused:
        raise UsageError(f"None of the policies {', '.join(out)} has a parameter {min(unused)!r}.")
    return out
