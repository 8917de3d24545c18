"""Fetch llama.cpp at the pinned version and apply our patches: vendor/llama.cpp and vendor/llama_cpp.

The source comes from the sdist of llama-cpp-python on PyPI, through pip and so with the user's own index settings.
The sdist's sha256 is compared with ``llama.cpp.lock`` before anything in it runs. Nothing is done when the tree is
already what the lock and the patches say; an edited patch starts again from the cached sdist. Run by CMake; needs the
standard library, pip and git.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NoReturn

import licenses

HERE = Path(__file__).resolve().parent
PATCHES = HERE.parent / "patches"
SOURCE = HERE / "llama.cpp"
BINDING = HERE / "llama_cpp"
CACHE = HERE / ".cache"
STAMP = HERE / ".fetched"


def read_lock() -> dict[str, str]:
    """The lock's ``key = "value"`` lines (a subset of TOML that needs no parser on Python 3.10)."""
    lock = {}
    for line in (HERE / "llama.cpp.lock").read_text().splitlines():
        key, sep, value = line.partition("=")
        if sep and not line.startswith("#"):
            lock[key.strip()] = value.strip().strip('"')
    return lock


def fingerprint(patches: list[Path]) -> str:
    """Hash of everything that decides what the fetched tree looks like."""
    digest = hashlib.sha256((HERE / "llama.cpp.lock").read_bytes())
    for patch in patches:
        digest.update(patch.name.encode() + patch.read_bytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def get_sdist(lock: dict[str, str]) -> Path:
    """The verified sdist, downloaded through pip unless it is cached."""
    name, version, expected = lock["package"], lock["version"], lock["sdist_sha256"]
    cached = CACHE / f"{name.replace('-', '_')}-{version}.tar.gz"
    if cached.exists() and sha256(cached) == expected:
        return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
        print(f"fetching {name} {version} (llama.cpp {lock['llama_cpp_commit']})", flush=True)
        # pip runs the build backend of what it downloads, for its metadata: with a hash it compares that first
        pinned = Path(tmp) / "requirements.txt"
        pinned.write_text(f"{name}=={version} --hash=sha256:{expected}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "-d", tmp]
        # nor must that build start compiling
        environment = dict(os.environ, CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF")
        done = subprocess.run(
            [*command, "--require-hashes", "-r", str(pinned)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout + done.stderr
        if "DO NOT MATCH THE HASHES" in said:
            got = re.search(r"Got\s+([0-9a-f]{64})", said)
            refuse(name, version, got[1] if got else "another one", expected)
        found = list(Path(tmp).glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            sys.exit(f"pip could not download {name} {version}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        actual = sha256(found[0])
        if actual != expected:
            refuse(name, version, actual, expected)
        os.replace(found[0], cached)
    return cached


def refuse(name: str, version: str, actual: str, expected: str) -> NoReturn:
    sys.exit(f"the sdist of {name} {version} has sha256 {actual}, expected {expected}: not the pinned source")


def unpack(sdist: Path, target: Path) -> None:
    """Extract vendor/llama.cpp and the binding's Python package from the sdist into ``target``."""
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        for member in archive:
            path = member.name.removeprefix(root + "/")
            # the sdist carries a dangling .git file, which would confuse git
            if member.issym() or member.islnk() or {"..", ".git"} & set(path.split("/")):
                continue
            if path.startswith("vendor/llama.cpp/"):
                member.name = path.removeprefix("vendor/")
            elif not path.startswith("llama_cpp/") and path != "LICENSE.md":
                continue
            else:
                member.name = path
            archive.extract(member, target)


def apply_patches(patches: list[Path], tree: Path) -> None:
    # inside a checkout git would take the paths as relative to its root and skip the patch without a word
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tree.parent))
    for patch in patches:
        command = ["git", "apply", "--whitespace=nowarn", str(patch)]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{patch.name} does not apply (see patches/README.md):\n{done.stderr}")


def main() -> None:
    patches = sorted(PATCHES.glob("[0-9]*.patch"))
    wanted = fingerprint(patches)
    if STAMP.exists() and STAMP.read_text() == wanted and SOURCE.exists() and BINDING.exists():
        return
    sdist = get_sdist(read_lock())
    STAMP.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
        unpack(sdist, Path(tmp))
        apply_patches(patches, Path(tmp) / "llama.cpp")
        shutil.move(Path(tmp) / "LICENSE.md", Path(tmp) / "llama_cpp" / "LICENSE.md")
        for name, final in (("llama.cpp", SOURCE), ("llama_cpp", BINDING)):
            if final.exists():
                update_tree(Path(tmp) / name, final)
            else:
                os.replace(Path(tmp) / name, final)
    licenses.write(SOURCE, BINDING)
    STAMP.write_text(wanted)
    print(f"llama.cpp {read_lock()['llama_cpp_commit']} with {len(patches)} patches is in {SOURCE}", flush=True)


def update_tree(new: Path, old: Path) -> None:
    """Make ``old`` equal to ``new``, leaving equal files untouched so that a build stays incremental."""
    for path in [p for p in old.rglob("*") if p.is_file() and not (new / p.relative_to(old)).exists()]:
        path.unlink()
    for path in [p for p in new.rglob("*") if p.is_file()]:
        target = old / path.relative_to(new)
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


if __name__ == "__main__":
    main()
