"""The devices that ggml can compute on, and whether page kernels read what lies there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kvlocal.native import library
from kvlocal.native.cache import Layer

KernelState = Literal["tested on hardware", "emulated only", "portable path"]
"""How attention over pages on a device is computed: by page kernels whose tests ran on hardware, or under emulation
alone; or by stock operators."""


@dataclass(frozen=True)
class HardwareTest:
    """When the tests of a backend's page kernels last ran on hardware, and on which."""

    date: str
    card: str


TESTED: dict[str, HardwareTest | None] = {
    "CPU with AVX2": HardwareTest("2026-11-26", "AMD EPYC (Zen 3)"),
    "CPU with AVX-512": HardwareTest("2026-11-21", "AMD EPYC"),
    "CPU with NEON": None,
    "CPU with plain loops": None,
}
"""By backend as ggml names it, of the CPU by vector code: when the whole suite last passed there; ``None`` or no entry:
never."""

_DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """One of ggml's devices.

    Attributes:
        kind: cpu, gpu, igpu, accel or meta.
        kernels: how attention over pages is computed that layers on it have; tested: on which hardware its page kernels
            were tested, ``None``: on none, or it has none.
    """

    name: str
    description: str
    kind: str
    backend: str
    free_bytes: int
    total_bytes: int
    kernels: KernelState
    tested: HardwareTest | None = None


@dataclass(frozen=True)
class Placement:
    """How many layers have their pages on a device, and how attention over them is computed there."""

    device: str
    n_layer: int
    kernels: KernelState


def hardware_test(backend: str, vectors: str) -> HardwareTest | None:
    """On which hardware the page kernels of a backend were tested; ``vectors``: see :func:`vector_code`."""
    return TESTED.get(f"CPU with {vectors}" if backend == "CPU" else backend)


def kernel_state(backend: str, vectors: str, has_kernels: bool) -> KernelState:
    if not has_kernels:
        return "portable path"
    return "tested on hardware" if hardware_test(backend, vectors) else "emulated only"


def read_system_info(text: str) -> dict[str, dict[str, str]]:
    """``CPU : AVX = 1 | FMA = 1 | CUDA : ARCHS = 900 |`` as names and values per backend."""
    out: dict[str, dict[str, str]] = {}
    backend = ""
    for item in text.split(" | "):
        head, colon, rest = item.partition(" : ")
        if colon:
            backend, item = head.strip(), rest
        name, equals, value = item.partition(" = ")
        if equals:
            out.setdefault(backend, {})[name.strip()] = value.strip()
    return out


def vector_code(build: dict[str, str]) -> str:
    """Which of their vector types the CPU's page kernels were compiled to (kvl-simd.h)."""
    if "AVX512" in build:
        return "AVX-512"
    if {"AVX2", "FMA", "F16C"} <= build.keys():
        return "AVX2"
    return "NEON" if "NEON" in build else "plain loops"


def list_devices() -> list[Device]:
    """The devices that ggml can compute on; the library must load."""
    native = library.load()
    registry, base = library.open_library("ggml"), library.open_library("ggml-base")
    count, get = registry.ggml_backend_dev_count, registry.ggml_backend_dev_get
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]

    def ask(name: str, kind: Any, *args: Any) -> Any:
        function = getattr(base, name)
        function.restype, function.argtypes = kind, [ctypes.c_void_p, *([ctypes.c_void_p] * (len(args) - 1))]
        return function(*args)

    vectors = vector_code(read_system_info(native.llama.llama_print_system_info().decode()).get("CPU", {}))
    out = []
    for i in range(count()):
        device, free, total = get(i), ctypes.c_size_t(), ctypes.c_size_t()
        ask("ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total))
        kind = ask("ggml_backend_dev_type", ctypes.c_int, device)
        registered = ask("ggml_backend_dev_backend_reg", ctypes.c_void_p, device)
        backend = ask("ggml_backend_reg_name", ctypes.c_char_p, registered).decode("utf-8", "replace")
        has_kernels = native.check(native.lib.kvl_has_kernels(device)) == 1
        out.append(
            Device(
                name=ask("ggml_backend_dev_name", ctypes.c_char_p, device).decode("utf-8", "replace"),
                description=ask("ggml_backend_dev_description", ctypes.c_char_p, device).decode("utf-8", "replace"),
                kind=_DEVICE_KINDS[kind] if kind < len(_DEVICE_KINDS) else str(kind),
                backend=backend,
                free_bytes=free.value,
                total_bytes=total.value,
                kernels=kernel_state(backend, vectors, has_kernels),
                tested=hardware_test(backend, vectors) if has_kernels else None,
            )
        )
    return out


def placements(layers: Iterable[Layer], devices: Iterable[Device]) -> list[Placement]:
    """Where the pages of layers lie, a row per device, in the order of the layers."""
    known = {device.name: device for device in devices}
    counts: dict[tuple[str, KernelState], int] = {}
    for layer in layers:
        key = (layer.device, known[layer.device].kernels if layer.kernels else "portable path")
        counts[key] = counts.get(key, 0) + 1
    return [Placement(device, n, state) for (device, state), n in counts.items()]
