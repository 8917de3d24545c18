"""What a measurement says about the machine."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path

import pytest

from kvlocal.measure import machine
from kvlocal.native.threads import Cores


def test_the_processor_is_named_as_it_names_itself(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 2\nmodel name\t: Fast Chip 9\nmodel name\t: Fast Chip 9\n")
    assert machine.cpu_name(info) == "Fast Chip 9"
    info.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    for nameless in (info, tmp_path / "missing"):
        assert machine.cpu_name(nameless) == (platform.processor() or platform.machine())


def test_instruction_sets_have_the_names_of_llama_cpp(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu pni ssse3 avx avx2 fma avx512f avx512_vnni\nbugs\t: f16c\n")
    has = machine.cpu_features(info)
    assert [name for name in has if has[name]] == ["SSE3", "SSSE3", "AVX", "AVX2", "FMA", "AVX512", "AVX512_VNNI"]
    assert has["F16C"] is False and "NEON" not in has
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm\n")
    has = machine.cpu_features(info)
    assert [name for name in has if has[name]] == ["NEON", "ARM_FMA", "DOTPROD", "MATMUL_INT8", "SVE"]
    assert has["SME"] is False and "AVX" not in has


@pytest.mark.parametrize(
    ("architecture", "features"), [("AMD64", {"AVX2": True, "FMA": False}), ("arm64", {"NEON": True, "ARM_FMA": True})]
)
def test_elsewhere_numpy_tells_what_it_knows(
    architecture: str, features: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "_numpy_features", lambda: {"AVX2": True, "FMA3": False, "ASIMD": True})
    assert machine.cpu_features(tmp_path / "missing") == features


def test_numpy_and_linux_agree() -> None:
    here, numpy = machine.cpu_features(), machine.cpu_features(Path("/nowhere"))
    assert numpy and {name: here[name] for name in numpy if name in here} == numpy


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "1M", "32768K", "unknown")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert machine.last_level_cache_bytes(tmp_path) == 32 << 20
    assert machine.last_level_cache_bytes(tmp_path / "missing") == 0


@pytest.mark.parametrize("n_threads", [1, 3])
def test_bandwidth_is_the_bytes_over_the_seconds_of_the_fastest_pass(
    monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    # passes of 4, 2, 1, 3 and 5 seconds
    times = itertools.chain.from_iterable([(0.0, seconds) for seconds in (4.0, 2.0, 1.0, 3.0, 5.0)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    assert machine.read_bandwidth(n_threads, 1 << 20) == 1 << 20


def test_the_description_has_the_threads_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda n: float(n))
    monkeypatch.setattr(machine, "usable_cores", lambda: Cores(12, 6, 0, 2.5))
    assert machine.describe_machine(2).read_bytes_per_s == 2
    all_cores = machine.describe_machine(0)
    assert (all_cores.cores, all_cores.threads, all_cores.read_bytes_per_s) == (6, 3, 3)
