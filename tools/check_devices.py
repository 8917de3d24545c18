"""Compiles our hooks in the CUDA and Metal backends, and our files for them, on a machine without the hardware.

    python tools/check_devices.py

CUDA: nvcc from wheels compiles ggml-cuda.cu and our .cu files as objects of the real target, for one architecture; the
whole backend takes an hour of processor time. Metal: the C++ files with our hunks and our own compile on any system.
Of both, every function of ours that an object calls must be in another one, since neither backend is linked. The
compilers lie in build/check-devices, which stays as long as tools/check_devices.txt does.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERLAY = ROOT / "patches" / "overlay"
GGML = ROOT / "vendor" / "llama.cpp" / "ggml"
REQUIREMENTS = Path(__file__).with_suffix(".txt")
BUILD = ROOT / "build" / "check-devices"
ARCHITECTURE = "90-real"
LINES = 40
"""How much of a command's output is shown when it fails."""


class CheckFailed(Exception):
    """A check that did not pass; the text says which command and what it said."""


def run(*command: str | Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-LINES:])
        raise CheckFailed(f"{Path(command[0]).name} returned {done.returncode}:\n{said}")
    return done.stdout


def get_hooked(backend: str) -> list[Path]:
    """The files of a backend in which a patch has hunks."""
    text = "".join(path.read_text() for path in sorted((ROOT / "patches").glob("*.patch")))
    names = re.findall(rf"^\+\+\+ b/ggml/src/({backend}/.+)$", text, re.MULTILINE)
    if not names:
        raise CheckFailed(f"no patch has hunks in {backend}")
    return [GGML / "src" / name for name in names]


def get_toolchain() -> Path:
    """The folder of the wheels in tools/check_devices.txt, downloaded unless it is there."""
    folder = BUILD / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    tools = folder / "tools"
    if tools.exists():
        return tools
    if BUILD.exists():
        shutil.rmtree(BUILD)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        print("cuda: downloading the compilers, 840 MB once", flush=True)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:")
        run(*pip, "--require-hashes", "--target", f"{tmp}/tools", "-r", REQUIREMENTS)
        cuda = Path(tmp, "tools", "nvidia", "cu13")
        (cuda / "lib64").symlink_to("lib")
        for name in ("cublas", "cublasLt", "cudart"):
            (cuda / "lib" / f"lib{name}.so").symlink_to(f"lib{name}.so.13")
        os.replace(f"{tmp}/tools", tools)
    return tools


def functions(objects: Iterable[Path], called: bool) -> set[str]:
    """Functions of ours that objects call and do not have, or those that they have."""
    rows = [line.split() for path in objects for line in run("nm", "-P", "-g", path).splitlines()]
    return {row[0] for row in rows if re.match(r"_*(Z\d+)?kvl_", row[0]) and (row[1] == "U") == called}


def check_calls(hooked: list[Path], ours: list[Path]) -> None:
    """Every object with hooks calls functions of ours, and all that are called are there."""
    for path in hooked:
        if not functions([path], called=True):
            raise CheckFailed(f"{path.name} calls nothing of ours: its hooks are missing")
    lacking = functions([*hooked, *ours], called=True) - functions(ours, called=False)
    if lacking:
        raise CheckFailed(f"functions that are called and not there: {', '.join(sorted(lacking))}")


def check_cuda() -> str:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"not checked: there are no wheels of nvcc for {platform.system()} on {platform.machine()}"
    tools = get_toolchain()
    cuda, objects, ninja = tools / "nvidia" / "cu13", tools.parent / "objects", tools / "bin" / "ninja"
    run(
        tools / "cmake" / "data" / "bin" / "cmake",
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", ROOT / "vendor", "-B", objects),
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}"),
        # without these two another toolkit's libraries may be found
        *(f"-DCMAKE_CUDA_COMPILER={cuda}/bin/nvcc", f"-DCUDAToolkit_ROOT={cuda}"),
        # what needs NCCL or the driver's library cannot be configured without them
        *("-DGGML_CUDA_NCCL=OFF", "-DGGML_CUDA_NO_VMM=ON"),
    )
    targets = [line.split(":")[0] for line in run(ninja, "-C", objects, "-t", "targets", "all").splitlines()]

    def find(source: Path) -> str:
        found = [name for name in targets if "/ggml-cuda.dir/" in name and name.endswith(f"/{source.name}.o")]
        if len(found) != 1:
            raise CheckFailed(f"{source.name} is {len(found)} times among the objects of ggml-cuda, expected once")
        return found[0]

    hooked = [find(path) for path in get_hooked("ggml-cuda")]
    ours = [find(path) for path in sorted((OVERLAY / "ggml-cuda").glob("*.cu"))]
    run(ninja, "-C", objects, *hooked, *ours)
    check_calls([objects / name for name in hooked], [objects / name for name in ours])
    return f"files with our hooks: {len(hooked)}, ours: {len(ours)}; they compile for {ARCHITECTURE}"


def check_metal() -> str:
    run(sys.executable, ROOT / "vendor" / "fetch.py")
    metal, ours = GGML / "src" / "ggml-metal", sorted((OVERLAY / "ggml-metal").glob("*.cpp"))
    includes = (GGML / "include", GGML / "src", metal, OVERLAY / "include", OVERLAY / "ggml-metal")
    with tempfile.TemporaryDirectory() as tmp:

        def compile_file(source: Path) -> Path:
            # upstream's files take <memory> from Apple's headers; their warnings are not ours to mend
            flags = ("-std=c++17", "-w", "-include", "memory", *(f"-I{path}" for path in includes))
            target = Path(tmp) / f"{source.name}.o"
            run(os.environ.get("CXX", "c++"), *flags, "-c", "-o", target, source)
            return target

        hooked = [compile_file(path) for path in get_hooked("ggml-metal")]
        check_calls(hooked, [compile_file(path) for path in ours])
    return f"files with our hooks: {len(hooked)}, ours: {len(ours)}; they compile"


CHECKS: dict[str, Callable[[], str]] = {"metal": check_metal, "cuda": check_cuda}


def main() -> int:
    failed = 0
    for name, check in CHECKS.items():
        start = time.monotonic()
        try:
            said = check()
        except (CheckFailed, OSError) as error:
            failed += 1
            said = f"FAILED: {error}"
        print(f"{name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
