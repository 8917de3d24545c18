"""The models on disk: those that kvlocal fetched or wrote, and the GGUF files in the Hugging Face hub's cache."""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvlocal.errors import KVError, UsageError
from kvlocal.models.default import fetched_default
from kvlocal.models.folder import models_dir
from kvlocal.models.hub import hub_cache, import_hub
from kvlocal.models.parts import PART
from kvlocal.native import library
from kvlocal.native.names import plain_line

_GGUF_UINT32, _GGUF_STRING = 4, 8  # gguf_type


@dataclass(frozen=True)
class ModelFile:
    """One model, in one file or in several parts.

    Attributes:
        name: the file's name in kvlocal's cache; ``hf:USER/REPO:FILE`` of the hub, which commands take as MODEL.
        path: of the (first) file.
        cache: whose cache it lies in.
        files: all that removing it removes: parts, and the same file in other revisions of a repository.
        size_bytes: of these together, what revisions share counted once.
        architecture, quantization: as the header says, None if it does not.
        last_used: when it was last read, seconds since 1970, as far as the file system keeps that.
        is_default: whether it runs when no model is named.
    """

    name: str
    path: Path
    cache: Literal["kvlocal", "huggingface"]
    files: tuple[Path, ...]
    size_bytes: int
    architecture: str | None
    quantization: str | None
    last_used: float
    is_default: bool = False


def list_models() -> list[ModelFile]:
    """All models, kvlocal's first, each cache by name."""
    return [*_own_models(), *_hub_models()]


def find_model(spec: str) -> ModelFile:
    """The one model of :func:`list_models` that is meant.

    Args:
        spec: its name or path; of the hub also ``USER/REPO`` or ``USER/REPO:QUANT``, with or without ``hf:``.

    Raises:
        UsageError: none or several are meant.
    """
    models = list_models()
    # a whole name first: it may also be the beginning of others
    fitting = [model for model in models if spec == model.name] or [model for model in models if _fits(model, spec)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(model.name for model in fitting)
        raise UsageError(f"{spec!r} fits {len(fitting)} models; name one of {names}.")
    caches = " or ".join(str(folder) for folder in (models_dir(), hub_cache()) if folder is not None)
    raise UsageError(f"There is no model {spec!r} in {caches}; `kvlocal models` lists what is there.")


def remove_model(model: ModelFile) -> int:
    """Remove a model of :func:`list_models` from its cache; returns the bytes that are free now.

    Nothing outside the caches is touched: what a link there points to stays.

    Raises:
        KVError: its files do not lie in the cache, or cannot be removed.
    """
    try:
        return _remove_hub_files(model) if model.cache == "huggingface" else _remove_own_files(model)
    except OSError as error:
        raise KVError(f"{model.path} cannot be removed: {error.strerror or error}.") from error


def _fits(model: ModelFile, spec: str) -> bool:
    if Path(os.path.abspath(Path(spec).expanduser())) in model.files:
        return True
    if model.cache != "huggingface":
        return False
    repo, _, file = spec.removeprefix("hf:").partition(":")
    its_repo, _, its_file = model.name.removeprefix("hf:").partition(":")
    # a quantization, as `hf:USER/REPO:Q8_0` names it
    is_quant = re.search(rf"(?:^|[-._/]){re.escape(file)}(?=[-._/])", its_file, re.IGNORECASE) is not None
    return repo == its_repo and (not file or file == its_file or is_quant)


def _first_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by model: a split one under the name of its first part."""
    out: dict[str, list[str]] = {}
    for name in sorted(names):
        out.setdefault(PART.sub(r"-00001-of-\2", name), []).append(name)
    return out


#
# kvlocal's own
#


def _own_models() -> list[ModelFile]:
    folder = models_dir()
    sizes: dict[str, os.stat_result] = {}
    for path in folder.glob("*"):
        if path.suffix.lower() != ".gguf":
            continue
        try:
            found = path.stat()
        except OSError:  # a link to nothing, or just removed
            continue
        if stat.S_ISREG(found.st_mode):
            sizes[path.name] = found
    default = fetched_default()
    out = []
    for name, parts in _first_parts(sizes).items():
        path = folder / parts[0]
        stats = [sizes[part] for part in parts]
        header = read_header(path)
        out.append(
            ModelFile(
                name=name,
                path=path,
                cache="kvlocal",
                files=tuple(folder / part for part in parts),
                size_bytes=sum(stat.st_size for stat in stats),
                architecture=header.architecture,
                quantization=header.quantization,
                # some file systems do not keep the time of reading
                last_used=max(max(stat.st_atime, stat.st_mtime) for stat in stats),
                is_default=path == default,
            )
        )
    return out


def _remove_own_files(model: ModelFile) -> int:
    freed = 0
    for path in model.files:
        if path.parent != models_dir():
            raise KVError(f"{path} does not lie in {models_dir()}; remove it yourself.")
        # of a link only the link goes
        freed += path.lstat().st_size
        path.unlink()
    return freed


#
# the hub's
#


def _scan_hub() -> Any:
    """The hub's own view of its cache, None if there is none."""
    try:
        hub = import_hub()
    except ImportError:
        return None
    try:
        return hub.scan_cache_dir()
    except (hub.utils.CacheNotFound, OSError, ValueError):
        return None


def _hub_models() -> list[ModelFile]:
    scan = _scan_hub()
    out = []
    for repo in scan.repos if scan is not None else ():
        if repo.repo_type != "model":
            continue
        found: dict[str, list[Any]] = {}
        # the revision that a name refers to first, else the latest
        for revision in sorted(repo.revisions, key=lambda rev: (not rev.refs, -rev.last_modified)):
            for file in revision.files:
                if file.file_name.endswith(".gguf"):
                    found.setdefault(file.file_path.relative_to(revision.snapshot_path).as_posix(), []).append(file)
        for name, parts in _first_parts(found).items():
            files = [file for part in parts for file in found[part]]
            path = Path(found[parts[0]][0].file_path)
            blobs = {file.blob_path: file.size_on_disk for file in files}
            header = read_header(path)
            out.append(
                ModelFile(
                    name=f"hf:{repo.repo_id}:{name}",
                    path=path,
                    cache="huggingface",
                    files=tuple(Path(file.file_path) for file in files),
                    size_bytes=sum(blobs.values()),
                    architecture=header.architecture,
                    quantization=header.quantization,
                    last_used=max(max(file.blob_last_accessed, file.blob_last_modified) for file in files),
                )
            )
    return sorted(out, key=lambda model: model.name)


def _remove_hub_files(model: ModelFile) -> int:
    """Whole revisions if nothing else lies in them, else the files alone."""
    scan = _scan_hub()
    repos = scan.repos if scan is not None else ()
    for repo in repos:
        files = [file for revision in repo.revisions for file in revision.files if file.file_path in model.files]
        if not files:
            continue
        revisions = [rev for rev in repo.revisions if any(file in rev.files for file in files)]
        if all(file in files for rev in revisions for file in rev.files):
            strategy = scan.delete_revisions(*(rev.commit_hash for rev in revisions))
            # copies of a repository share the hashes of its revisions
            if _lies_in(repo.repo_path, strategy):
                strategy.execute()
                return int(strategy.expected_freed_size)
        if not hasattr(scan, "delete_files"):
            raise KVError(
                f"{model.name} shares its revision with other files, which this huggingface_hub cannot keep: "
                "pip install -U huggingface_hub, or remove all of it with `hf cache delete`."
            )
        strategy = scan.delete_files(*files)
        if not _lies_in(repo.repo_path, strategy):
            raise KVError(f"{model.path} points out of {repo.repo_path}; remove it yourself.")
        strategy.execute()
        return int(strategy.expected_freed_size)
    raise KVError(f"{model.path} is no longer in the cache of the Hugging Face hub.")


def _lies_in(folder: Path, strategy: Any) -> bool:
    """Whether all that would be removed is a repository's folder or lies in it."""
    kinds = ("blobs", "refs", "repos", "snapshots", "files")
    paths = {Path(path) for kind in kinds for path in getattr(strategy, kind, ())}
    return all(Path(os.path.abspath(path)).is_relative_to(folder) for path in paths)


#
# headers
#


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, such as llama and Q4_K_M; None where it does not."""

    architecture: str | None = None
    quantization: str | None = None


def read_header(path: Path) -> Header:
    """By llama.cpp's own reader, without the weights; empty if the file or the library cannot be read.

    The file's time of reading stays: to look at a model is not to use it.
    """
    try:
        before = path.stat()
        # to open a pipe would be to wait for its other end
        header = _read_header(path) if stat.S_ISREG(before.st_mode) else Header()
    except (KVError, OSError):
        return Header()
    with suppress(OSError):  # somebody else's file
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return header


def _read_header(path: Path) -> Header:
    lib = library.open_library("ggml-base")
    ptr, text, i64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", ptr, [text, _GgufParams]),
        ("gguf_free", None, [ptr]),
        ("gguf_find_key", i64, [ptr, text]),
        ("gguf_get_kv_type", ctypes.c_int, [ptr, i64]),
        ("gguf_get_val_str", text, [ptr, i64]),
        ("gguf_get_val_u32", ctypes.c_uint32, [ptr, i64]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    file = lib.gguf_init_from_file(os.fsencode(path), _GgufParams(True, None))
    if not file:
        return Header()

    def find(key: bytes, kind: int) -> int:
        at = int(lib.gguf_find_key(file, key))
        # reading another type would end the process
        return at if at >= 0 and lib.gguf_get_kv_type(file, at) == kind else -1

    try:
        arch, kind = find(b"general.architecture", _GGUF_STRING), find(b"general.file_type", _GGUF_UINT32)
        return Header(
            plain_line(lib.gguf_get_val_str(file, arch).decode("utf-8", "replace")) if arch >= 0 else None,
            _file_type(lib.gguf_get_val_u32(file, kind)) if kind >= 0 else None,
        )
    finally:
        lib.gguf_free(file)


def _file_type(number: int) -> str | None:
    from gguf import LlamaFileType

    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # newer than the package
        return None
