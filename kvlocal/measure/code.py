"""Which code a measurement was made with: hashes of the package, its native library and a policy; and the commit."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import kvlocal
from kvlocal import __version__
from kvlocal.native import library
from kvlocal.policies.parts.policy import Policy

PACKAGE = Path(kvlocal.__file__).resolve().parent

_State = tuple[int, ...]


def code_digest() -> str:
    """SHA-256 of the package's Python files and of the bytes of its native library and binding.

    A file is read once per process, and again when its size or a time of change is another.
    """
    files = sorted(PACKAGE.rglob("*.py"))
    for part in ("lib", "binding"):
        folder = library.installed(part)
        files += sorted(path for path in folder.rglob("*") if _is_code(path))
    return _digest(files)


def policy_digest(policy: Policy) -> str:
    """SHA-256 of the files of a policy that is not of this package, "" for one that is.

    These are its module, or its whole package, those of its base classes, and what they import, the standard library
    and installed packages excepted. A policy without a file or source is never the same twice.
    """
    units = {cls.__module__.partition(".")[0]: cls for cls in reversed(type(policy).__mro__)}
    units = {name: cls for name, cls in units.items() if name not in sys.stdlib_module_names - {"__main__"}}
    units.pop("kvlocal", None)
    if not units:
        return ""
    files: dict[Path, None] = {}
    extra = []
    for name, cls in units.items():
        root = _unit(sys.modules.get(name))
        if root is None:
            extra.append(_source(cls))
        else:
            _collect(root, files)
    return hashlib.sha256(" ".join([_digest(sorted(files)), *extra]).encode()).hexdigest()


@functools.cache
def commit() -> str:
    """``git describe`` of the source that runs, ``-dirty`` if it was changed; the version where there is no git."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return __version__
    # in a hook, git's own variables name another repository
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags", "--abbrev=12"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else __version__


#
# files
#


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {_hash(path, _state(path))}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _state(path: Path) -> _State:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, _state: _State) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_code(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


#
# policies from elsewhere
#


def _unit(module: ModuleType | None) -> Path | None:
    """The file of a module, or the folder of a package."""
    paths = list(getattr(module, "__path__", ()))
    name = paths[0] if paths else getattr(module, "__file__", None)
    return Path(name) if name and Path(name).exists() else None


def _source(cls: type) -> str:
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()
    except (OSError, TypeError):
        return uuid.uuid4().hex


def _collect(unit: Path, files: dict[Path, None]) -> None:
    """Add the files of a module or package, and of those that it imports."""
    mine = [path for path in unit.rglob("*") if _is_code(path)] if unit.is_dir() else [unit]
    new = [path for path in mine if path not in files]
    files.update(dict.fromkeys(new))
    for path in new:
        if path.suffix == ".py":
            for name in _imports(path, _state(path)):
                other = _own(name, unit.parent)
                if other is not None and other != unit:
                    _collect(other, files)


@functools.lru_cache(maxsize=1024)
def _imports(path: Path, _state: _State) -> frozenset[str]:
    """Names of the modules that a file imports, without what follows the first point."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module

    try:
        return frozenset(name.partition(".")[0] for name in names())
    except (SyntaxError, ValueError):
        return frozenset()


def _own(name: str, beside: Path) -> Path | None:
    """A module's file or package's folder, if it is neither ours, nor Python's, nor installed."""
    if name == "kvlocal" or name in sys.stdlib_module_names:
        return None
    out = _unit(sys.modules.get(name))
    if out is None:
        spec = PathFinder.find_spec(name, [str(beside), *sys.path])
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        found = places[0] if places else spec.origin if spec is not None else None
        out = Path(found) if found and Path(found).exists() else None
    installed = (Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    return None if out is None or any(out.is_relative_to(folder) for folder in installed) else out
