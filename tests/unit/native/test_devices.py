"""What is said of the page kernels of a device: tested on hardware, emulated only, portable path."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlocal.native import devices
from kvlocal.native.cache import Layer
from kvlocal.native.devices import (
    TESTED,
    Device,
    HardwareTest,
    KernelState,
    Placement,
    hardware_test,
    kernel_state,
    placements,
    read_system_info,
    vector_code,
)

CPU = Device("CPU", "Fast Chip 9", "cpu", "CPU", 1, 2, "tested on hardware")
GPU = Device("Big0", "Big GPU", "gpu", "Big", 1, 2, "emulated only")


def layer(device: str, kernels: bool) -> Layer:
    return Layer(0, 4, 2, 64, 64, 1.0, device, kernels)


@pytest.mark.parametrize(
    ("backend", "vectors", "has_kernels", "state"),
    [
        ("Card", "AVX2", True, "tested on hardware"),
        ("Card", "AVX2", False, "portable path"),
        ("CPU", "AVX2", True, "tested on hardware"),
        ("CPU", "NEON", True, "emulated only"),
        ("CPU", "unheard", True, "emulated only"),
        ("Other", "AVX2", True, "emulated only"),
        ("Other", "AVX2", False, "portable path"),
        ("Unheard", "AVX2", True, "emulated only"),
    ],
)
def test_the_state_follows_from_the_kernels_and_the_table(
    backend: str, vectors: str, has_kernels: bool, state: KernelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = HardwareTest("2026-01-31", "Card 7")
    monkeypatch.setattr(devices, "TESTED", {"Card": card, "CPU with AVX2": card, "CPU with NEON": None, "Other": None})
    assert kernel_state(backend, vectors, has_kernels) == state
    assert hardware_test("Card", "AVX2") == hardware_test("CPU", "AVX2") == card
    assert hardware_test("CPU", "NEON") is hardware_test("Unheard", "AVX2") is None


def test_layers_are_counted_by_the_device_of_their_pages() -> None:
    layers = [layer("CPU", True), layer("Big0", True), layer("CPU", True), layer("Big0", True), layer("Big0", True)]
    assert placements(layers, [CPU, GPU]) == [
        Placement("CPU", 2, "tested on hardware"),
        Placement("Big0", 3, "emulated only"),
    ]


def test_a_context_without_kernels_goes_the_portable_path_whatever_the_device_has() -> None:
    assert placements([layer("CPU", False)] * 3, [CPU]) == [Placement("CPU", 3, "portable path")]


def test_system_info_is_read_per_backend() -> None:
    text = "CUDA : ARCHS = 800,900 | USE_GRAPHS = 1 | CPU : AVX = 1 | SVE_CNT = 16 | "
    assert read_system_info(text) == {
        "CUDA": {"ARCHS": "800,900", "USE_GRAPHS": "1"},
        "CPU": {"AVX": "1", "SVE_CNT": "16"},
    }
    assert read_system_info("") == {}


def test_the_vector_code_of_the_kernels() -> None:
    assert vector_code({"AVX2": "1", "FMA": "1", "F16C": "1", "AVX512": "1"}) == "AVX-512"
    assert vector_code({"AVX2": "1", "FMA": "1", "F16C": "1"}) == "AVX2"
    assert vector_code({"AVX2": "1", "FMA": "1"}) == "plain loops"
    assert vector_code({"NEON": "1"}) == "NEON"


def test_the_table_of_the_docs_names_what_was_tested_on() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "install.md").read_text("utf-8")
    shown = {row.split(" | ")[2].strip(" |") for row in text.splitlines() if row.startswith("| the CPU, ")}
    assert shown == {f"tested on hardware: {on.card}, {on.date}" if on else "emulated only" for on in TESTED.values()}
