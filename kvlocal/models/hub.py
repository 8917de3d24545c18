"""Models of the Hugging Face hub: which file of a repository is meant, and fetching it into the hub's own cache."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvlocal.errors import KVError, UsageError
from kvlocal.models.folder import Progress
from kvlocal.models.parts import part_names

PREFERRED_QUANTS = ("Q4_K_M", "Q4_0", "Q8_0")
"""Which file of a repository is taken when none is named: the first of these that fits exactly one file."""

_HF_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")


def import_hub() -> Any:
    """The package huggingface_hub, silent.

    Raises:
        ImportError: it is not installed.
    """
    # it logs every attempt; what matters arrives as an exception
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    return importlib.import_module("huggingface_hub")


def hub_cache() -> Path | None:
    """Where the Hugging Face hub keeps what it fetched; None if its package is not installed."""
    try:
        return Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE).expanduser()
    except ImportError:
        return None


def hub_spec(text: str) -> str:
    """``USER/REPO[:FILE]`` or ``hf:USER/REPO[:FILE]``, as it was typed, as :func:`resolve_model` takes it.

    Raises:
        UsageError: it is neither.
    """
    spec = text if text.startswith("hf:") else f"hf:{text}"
    if _HF_SPEC.fullmatch(spec) is None:
        raise UsageError(f"{text!r} does not name a repository: write USER/REPO or USER/REPO:FILE")
    return spec


def hub_model(spec: str, progress: Progress | None = None) -> Path:
    """A file of a repository, fetched unless it is there; of a split model all parts, and the path of the first.

    Raises:
        UsageError: the spec, the repository or the file is none. KVError: it cannot be fetched.
    """
    match = _HF_SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec!r} does not name a repository: write hf:USER/REPO or hf:USER/REPO:FILE")
    try:
        hub = import_hub()
    except ImportError as error:
        raise KVError(f"{spec} needs the package huggingface_hub: pip install huggingface_hub") from error
    repo, name = match["repo"], match["file"]
    if name is None or not name.endswith(".gguf"):
        name = _pick(repo, _hub_files(hub, repo), name)
    paths = [_hub_download(hub, repo, part, progress) for part in part_names(name)]
    return paths[0]


def _hub_files(hub: Any, repo: str) -> list[str]:
    try:
        return list(hub.list_repo_files(repo))
    except Exception as error:
        # Offline, what was fetched before still works.
        if "RepositoryNotFoundError" not in _kinds(error) and (cached := _cached_files(hub, repo)):
            return cached
        raise _hub_error(repo, None, error) from error


def _cached_files(hub: Any, repo: str) -> list[str]:
    try:
        repos = hub.scan_cache_dir().repos
    except (hub.utils.CacheNotFound, OSError, ValueError):
        return []
    revisions = (revision for entry in repos if entry.repo_id == repo for revision in entry.revisions)
    return sorted({file.file_path.relative_to(rev.snapshot_path).as_posix() for rev in revisions for file in rev.files})


def _hub_download(hub: Any, repo: str, name: str, progress: Progress | None) -> Path:
    options = {}
    # Before version 1 the hub draws its own bars, and nothing else can be had.
    if progress is not None and "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        options["tqdm_class"] = _bar_class(hub, progress, f"{repo}/{name}")
    try:
        return Path(hub.hf_hub_download(repo, name, **options))
    except Exception as error:
        raise _hub_error(repo, name, error) from error


def _bar_class(hub: Any, progress: Progress, label: str) -> type:
    """Return a progress bar for the hub that draws nothing and tells `progress`."""
    base = hub.utils.tqdm
    bars: list[Any] = []

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **(kwargs | {"disable": True}))
        # Some downloads have two bars, bytes on the wire and bytes on disk; the first one has the file's size.
        bars.append(self)
        self.seen = kwargs.get("initial") or 0

    def update(self: Any, n: float | None = 1) -> None:
        self.seen += int(n or 0)
        if self is bars[0]:
            progress(self.seen, getattr(self, "total", None), label)

    return type("ProgressBar", (base,), {"__init__": init, "update": update})


def _pick(repo: str, files: Iterable[str], quant: str | None) -> str:
    """Choose the GGUF file of a repository: the only one, else by quantization."""
    names = [name for name in sorted(files) if name.endswith(".gguf") and "mmproj" not in name.lower()]
    names = [name for name in names if part_names(name)[0] == name]
    if not names:
        raise UsageError(f"the repository {repo} holds no GGUF model: name another, or convert the model")
    if len(names) == 1 and quant is None:
        return names[0]
    for wanted in PREFERRED_QUANTS if quant is None else (quant,):
        pattern = re.compile(rf"(?:^|[-._/]){re.escape(wanted)}(?=[-._/])", re.IGNORECASE)
        fitting = [name for name in names if pattern.search(name)]
        if len(fitting) == 1:
            return fitting[0]
    fault = "holds several models" if quant is None else f"does not hold exactly one file {quant}"
    raise UsageError(f"the repository {repo} {fault}: write hf:{repo}:FILE with FILE one of {listed(names)}")


def _hub_error(repo: str, name: str | None, error: Exception) -> KVError:
    kinds = _kinds(error)
    page = f"https://huggingface.co/{repo}"
    if "GatedRepoError" in kinds:
        return KVError(f"the repository {repo} is gated: ask for access at {page}, then run `hf auth login`")
    if "RepositoryNotFoundError" in kinds:
        return UsageError(f"there is no repository {repo} (or it is private: run `hf auth login`): see {page}")
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return UsageError(f"the repository {repo} has no file {name}: see {page}/tree/main")
    reason = re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0].rstrip(".")
    what = repo if name is None else f"{name} of {repo}"
    return KVError(f"could not fetch {what}: {reason}; check the network, or give the path of a GGUF file")


def _kinds(error: Exception) -> set[str]:
    # By name, since the hub's exceptions moved between modules and only some versions export them.
    return {kind.__name__ for kind in type(error).__mro__}


def listed(names: list[str], limit: int = 30) -> str:
    """Names for a sentence, the first of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
