"""What a shell can complete. Nothing here may load numpy or the library: somebody waits for it at every tab."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import click
from click.shell_completion import CompletionItem

POLICIES = (
    "full",
    "ladder",
    "streaming",
    "cascading",
    "snapkv",
    "pyramidkv",
    "ada-snapkv",
    "ada-pyramid",
    "sentencekv",
    "buzz",
    "h2o",
    "tova",
    "corm",
    "observed",
    "expected-attention",
    "chunkkv",
    "keydiff",
    "knorm",
    "random",
)
"""The names of `kvlocal.policies.REGISTRY`."""

RETRIEVERS = ("sentencekv", "quest", "recent")
"""The names of `kvlocal.retrieval.REGISTRY`."""

STORAGES = ("f16", "q8", "q4", "kv3", "kv2", "kivi", "logquant")
"""Those of `kvlocal.storage.storage.STORAGES`."""

BUDGETS = ("12.5%", "25%", "50%", "512", "1024", "2048", "4096", "256MiB", "512MiB", "1GiB")
"""Usual ones."""


def policies(_ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Policies, those of installed packages as well."""
    from importlib.metadata import entry_points

    own = ("paged",) if _is_list(param) else ()
    return _items(
        param, (*own, *POLICIES, *(point.name for point in entry_points(group="kvlocal.policies"))), incomplete
    )


def storages(_ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _items(param, STORAGES, incomplete)


def retrievers(_ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _items(param, RETRIEVERS, incomplete)


def budgets(_ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _items(param, BUDGETS, incomplete)


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Any file: the shell knows them itself."""
    return [CompletionItem(incomplete, type="file")]


def models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """GGUF files, and the folders on the way to them."""
    found = list(_entries(incomplete))
    if len(found) == 1 and found[0].endswith(os.sep):
        # a shell ends the word after the only match; with what is inside beside it, one can go on
        found += _entries(found[0])
    return [CompletionItem(path) for path in found]


def items_of_list(choices: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Completions of the last item of `a,b,c`."""
    start, comma, last = incomplete.rpartition(",")
    used = set(start.split(","))
    return [CompletionItem(start + comma + each) for each in choices if each.startswith(last) and each not in used]


def _is_list(param: click.Parameter) -> bool:
    return param.type.name == "list"


def _items(param: click.Parameter, choices: Iterable[str], incomplete: str) -> list[CompletionItem]:
    if _is_list(param):
        return items_of_list(choices, incomplete)
    return [CompletionItem(each) for each in choices if each.startswith(incomplete)]


def _entries(incomplete: str) -> Iterator[str]:
    folder, start = os.path.split(incomplete)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        hidden = entry.name.startswith(".") and not start.startswith(".")
        if hidden or not entry.name.startswith(start):
            continue
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            yield path + os.sep
        elif entry.name.lower().endswith(".gguf"):
            yield path
