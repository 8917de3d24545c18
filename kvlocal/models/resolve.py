"""Where a model comes from: the default model, a Hugging Face repository, or a path."""

from __future__ import annotations

import stat
from pathlib import Path

from kvlocal.errors import KVError, UsageError
from kvlocal.models.default import NAMED, default_model, fetched
from kvlocal.models.folder import Progress
from kvlocal.models.hub import hub_model, listed
from kvlocal.models.parts import part_names

HEADER_BYTES = 24
"""Magic, version and the two counts: no GGUF file is shorter."""

_GIVE = "give the path of a GGUF file, hf:USER/REPO[:FILE], or no model for the default one"


def resolve_model(spec: str | None = None, *, progress: Progress | None = None, verify: bool = False) -> Path:
    """Return the path of a GGUF file, fetching it first if need be.

    `spec`: None for the default model; a name of NAMED for one that `kvlocal pull` has fetched; `hf:USER/REPO` or
    `hf:USER/REPO:FILE` for a file of a Hugging Face repository, where FILE may also be a quantization such as Q8_0;
    else a path. A split model is named by its first part.
    `progress` is called while bytes arrive. `verify` hashes a default model that is already here (some 0.1 s per
    100 MB) and fetches it again if it is damaged; without it only its size is checked.
    Raises UsageError if what was named cannot be a model, KVError if fetching or reading it fails; in both cases
    nothing half-written stays behind. Two processes may fetch the same model at once.
    """
    if spec is not None and not spec.strip():
        raise UsageError(f"the name of the model is empty: {_GIVE}")
    if spec is None:
        return default_model(progress, verify=verify)
    if spec.startswith("hf:"):
        return _check_gguf(hub_model(spec, progress))
    if spec in NAMED and not Path(spec).exists():
        here = fetched(NAMED[spec])
        if here is None:
            raise UsageError(f"{spec} is not here yet: fetch it with `kvlocal pull {spec}`")
        return here
    return _check_gguf(Path(spec).expanduser())


def _check_gguf(path: Path) -> Path:
    try:
        mode, head = _look(path)
    except FileNotFoundError:
        raise UsageError(f"there is no model file {path}: {_GIVE}") from None
    except ValueError:  # with a null character
        raise UsageError(f"{str(path)!r} cannot be the path of a file: {_GIVE}") from None
    except OSError as error:
        raise KVError(f"cannot read the model file {path}: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        names = sorted(entry.name for entry in path.glob("*") if entry.suffix.lower() == ".gguf")
        hint = f"name one of its files: {listed(names)}" if names else "without a GGUF file in it: name a model file"
        raise UsageError(f"{path} is a directory, {hint}")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a regular file but a pipe or device: give a model in a file")
    if not b"GGUF".startswith(head[:4]):
        raise UsageError(f"{path} is not a GGUF file (it begins with {head[:4]!r}): give a model in GGUF format")
    if len(head) < HEADER_BYTES:
        raise KVError(f"{path} is truncated ({len(head)} bytes, less than a GGUF header): fetch it again")
    _check_parts(path)
    return path


def _look(path: Path) -> tuple[int, bytes]:
    """The mode of a file, and of a regular one its first bytes: opening a pipe would wait for its other end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return mode, b""
    with path.open("rb") as file:
        return mode, file.read(HEADER_BYTES)


def _check_parts(path: Path) -> None:
    """The other parts of a split model are there, as files."""
    for name in part_names(path.name):
        part = path.with_name(name)
        if not part.exists():
            raise UsageError(f"{path.name} is a part of a split model, and {name} is not beside it: fetch it too")
        if not part.is_file():
            raise UsageError(f"{part} is not a regular file: it must be a part of the model {path.name}")
