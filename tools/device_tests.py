"""Builds the library with Vulkan and runs the native tests on Mesa's CPU driver: `make test-device`. Needs no GPU.

    python tools/device_tests.py [arguments for pytest]

Everything it makes lies in build/device, Mesa's compiled shaders too, so that a second run is fast. For Debian 12 and
newer, and what is made of them. CMAKE_BUILD_PARALLEL_LEVEL says how many compilers run at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "device"
LIB_DIR = BUILD / "install" / "kvlocal" / "lib"
SYSTEM_HEADERS = Path("/usr/include")
PACKAGES = ("cmake", "glslc", "libvulkan-dev", "ninja-build", "spirv-headers")
OLDEST_HEADERS = 309
"""Third number of the oldest version of the Vulkan headers that the backend is known to compile with."""
NEWER_HEADERS = "libvulkan-dev=1.4.309.0-1"
HEADERS_SHA256 = {
    "amd64": "8d329d465e16168afff58b1bd0dd6db46aac2cc3f56054a481b25a04e90b345a",
}
"""The package of Debian 13, which is unpacked and not installed where the system's headers are older."""
MESA = "mesa-vulkan-drivers"
OLDEST_MESA = 23
"""Version 22.3 of Mesa, that of Debian 12, corrupts its own heap now and then in the tests; 25.0 does not."""
BACKPORTS = "bookworm-backports"
TESTS = (
    "tests/native/device",
    "tests/native/cache",
    *(f"tests/native/model/test_{name}.py" for name in ("against_stock", "long_batches", "no_alloc", "value_size")),
)
"""What an accelerator changes; the other tests of models do not put them there."""


def refuse(what: str) -> NoReturn:
    print(what, file=sys.stderr)
    sys.exit(1)


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=os.environ | (env or {}), check=False)
    if done.returncode != 0:
        refuse(
            f"`{' '.join(str(word) for word in command)}` failed with status {done.returncode}; its output is above."
        )


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def install_packages() -> None:
    """What is missing of PACKAGES, and a Mesa that is new enough, by apt-get when this is root."""
    if shutil.which("apt-get") is None:
        names = ", ".join((*PACKAGES, MESA))
        refuse(f"make test-device needs Debian's packages {names}, and there is no apt-get here.")
    state = {name: output("dpkg-query", "-W", "-f", "${db:Status-Status}", name) for name in PACKAGES}
    missing = [name for name in PACKAGES if state[name] != "installed"]
    if missing and os.geteuid() != 0:
        refuse(f"make test-device needs packages: run `apt-get install {' '.join(missing)}` as root, then try again.")
    if missing:
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", env=quiet)
        run("apt-get", "install", "-y", "--no-install-recommends", *missing, env=quiet)
    install_mesa()


def mesa_version() -> int:
    """The first number of the installed version, 0: none is installed."""
    found = re.match(r"\d+", output("dpkg-query", "-W", "-f", "${Version}", MESA))
    return int(found[0]) if found else 0


def install_mesa() -> None:
    """Mesa, that of the backports where the system's own is too old."""
    if mesa_version() >= OLDEST_MESA:
        return
    if os.geteuid() != 0:
        refuse(
            f"make test-device needs {MESA} {OLDEST_MESA} or newer: as root run `apt-get install {MESA}`, on Debian 12 "
            f"`apt-get install -t {BACKPORTS} {MESA}`, then try again."
        )
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    candidate = re.search(r"Candidate: (\d+)", output("apt-cache", "policy", MESA))
    words: list[str] = []
    if candidate is None or int(candidate[1]) < OLDEST_MESA:
        # beside the system's own lists, which stay as they are
        sources = Path("/etc/apt/sources.list")
        own = sources.read_text("utf-8") if sources.exists() else ""
        keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "sources.list").write_text(
            f"{own}\ndeb [signed-by={keys}] http://deb.debian.org/debian {BACKPORTS} main\n"
        )
        words = ["-o", f"Dir::Etc::sourcelist={BUILD / 'sources.list'}"]
        run("apt-get", *words, "update", env=quiet)
        words += ["-t", BACKPORTS]
    run("apt-get", *words, "install", "-y", "--no-install-recommends", MESA, env=quiet)
    if mesa_version() < OLDEST_MESA:
        refuse(f"make test-device needs {MESA} {OLDEST_MESA} or newer, and this system has none.")


def headers() -> Path:
    """The folder of Vulkan headers that are new enough: the system's, or those of Debian 13."""
    text = (SYSTEM_HEADERS / "vulkan" / "vulkan_core.h").read_text("utf-8")
    found = re.search(r"#define VK_HEADER_VERSION (\d+)", text)
    if found and int(found[1]) >= OLDEST_HEADERS:
        return SYSTEM_HEADERS
    folder = BUILD / "headers"
    if not (folder / "usr").is_dir():
        unpack_headers(folder)
    return folder / "usr" / "include"


def unpack_headers(folder: Path) -> None:
    architecture = output("dpkg", "--print-architecture").strip()
    if architecture not in HEADERS_SHA256:
        refuse(
            f"The Vulkan headers of this system are older than 1.4.{OLDEST_HEADERS}, and newer ones are known for "
            f"{', '.join(HEADERS_SHA256)} only, not for {architecture}."
        )
    apt = BUILD / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "new"):
        (apt / name).mkdir(parents=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keys}] http://deb.debian.org/debian trixie main\n")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",  # another user may not write here
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *words, "update")
    run("apt-get", *words, "download", NEWER_HEADERS, cwd=apt)
    package = next(apt.glob("*.deb"))
    actual = hashlib.sha256(package.read_bytes()).hexdigest()
    if actual != HEADERS_SHA256[architecture]:
        refuse(f"{package.name} has sha256 {actual}, expected {HEADERS_SHA256[architecture]}: not the pinned package.")
    run("dpkg", "-x", package, apt / "new")
    os.replace(apt / "new", folder)
    shutil.rmtree(apt)


def build() -> None:
    """The library with the Vulkan backend, in LIB_DIR."""
    run(
        "cmake", "-S", "vendor", "-B", BUILD, "-G", "Ninja", "-DGGML_VULKAN=ON",
        f"-DVulkan_INCLUDE_DIR={headers()}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={BUILD / 'install'}", "-DCMAKE_INSTALL_MESSAGE=NEVER",
    )  # fmt: skip
    run("cmake", "--build", BUILD, "--target", "llama")
    run("cmake", "--install", BUILD, "--component", "kvlocal")


def environment() -> dict[str, str]:
    """Of processes that are to see the library and Mesa's CPU driver as the one GPU."""
    drivers = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not drivers:
        refuse("Mesa's CPU driver is not in /usr/share/vulkan/icd.d; reinstall mesa-vulkan-drivers.")
    return {
        "KVLOCAL_LIB_DIR": str(LIB_DIR),
        "VK_DRIVER_FILES": str(drivers[0]),
        "GGML_VK_VISIBLE_DEVICES": "0",  # without it, drivers for the CPU are passed over
        "MESA_SHADER_CACHE_DIR": str(BUILD / "shaders"),
    }


def main() -> None:
    install_packages()
    BUILD.mkdir(parents=True, exist_ok=True)
    build()
    arguments = sys.argv[1:] or TESTS
    run(sys.executable, "-m", "pytest", "--device", "Vulkan0", *arguments, env=environment())


if __name__ == "__main__":
    main()
