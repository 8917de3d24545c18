"""What the doctor makes of an installation that is broken in one way or another; the library is not loaded."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvlocal.doctor import installation
from kvlocal.doctor import report as doctor
from kvlocal.doctor.installation import Library, find_library
from kvlocal.doctor.report import ModelInfo, examine
from kvlocal.doctor.selftest import Comparison
from kvlocal.errors import KVError
from kvlocal.native.devices import Device, Placement
from kvlocal.native.spinning import Spinning
from kvlocal.native.threads import Cores

BUILD = {"AVX2": "1", "FMA": "1", "F16C": "1", "OPENMP": "1"}
LIBRARY = Library(path="/lib/libllama.so", folder="/lib", ours=True, kernels="AVX2", system_info={"CPU": BUILD})
CPU_DEVICE = Device("CPU", "Fast Chip 9", "cpu", "CPU", 1, 2, "tested on hardware")
MODEL = ModelInfo("m.gguf", "Tiny", "llama 1B", "llama", 8192, 10**6, None, {"f16": None})


class Fake:
    """An installation where all is well."""

    def __init__(self) -> None:
        self.opened, self.fault = LIBRARY, ""
        self.has = {"AVX2": True, "FMA": True, "F16C": True, "AVX512": False}
        self.devices = [CPU_DEVICE]
        self.tests = [Comparison("rows", 0.0, 0.0)]
        self.model: ModelInfo | KVError = MODEL
        self.tested = 0

    def self_test(self, n_threads: int, on_step: Any) -> list[Comparison]:
        self.tested += 1
        on_step("rows")
        return self.tests

    def look(self, _path: Path, _n_gpu_layers: int, devices: list[Device], *, portable: bool) -> ModelInfo:
        assert devices == self.devices
        if isinstance(self.model, KVError):
            raise self.model
        return self.model


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(doctor, "find_library", lambda: (fake.opened, fake.fault))
    monkeypatch.setattr(doctor, "cpu_features", lambda: fake.has)
    monkeypatch.setattr(doctor, "list_devices", lambda: fake.devices)
    monkeypatch.setattr(doctor, "self_test", fake.self_test)
    monkeypatch.setattr(doctor, "_model", fake.look)
    return fake


def test_all_is_well(fake: Fake) -> None:
    steps: list[str] = []
    report = examine(Path("m.gguf"), on_step=steps.append)
    assert report.ok and report.failures == [] and report.warnings == []
    assert report.model == MODEL and report.tests == fake.tests
    assert (report.cpu.lacking, report.cpu.unused) == ([], [])
    assert report.cpu.built_for == report.cpu.features == ["AVX2", "FMA", "F16C"]
    assert steps == ["loading the library", "self-test: rows", "loading m.gguf"]
    assert report.memory.total_bytes >= report.memory.available_bytes > 0
    assert {"kvlocal", "python", "system", "numpy"} <= report.versions.keys()


@pytest.mark.parametrize("error", [0.1, None])
def test_a_failed_comparison_is_not_ok(error: float | None, fake: Fake) -> None:
    fake.tests = [Comparison("rows", 0.0, 0.0), Comparison("logits", error, 0.01)]
    assert not examine(None).ok
    fake.tests = [Comparison("logits", 0.01, 0.01), Comparison("rows", 0.0, 0.0, detail="it did not run")]
    assert not examine(None).ok


def test_a_library_that_does_not_load_ends_it(fake: Fake) -> None:
    fake.opened, fake.fault = Library(folder="/lib"), "The library is gone."
    report = examine(Path("m.gguf"), failures=["The network is down."])
    assert not report.ok and report.failures == ["The network is down.", "The library is gone."]
    assert (report.tests, report.model, report.devices, fake.tested) == ([], None, [], 0)
    assert report.cpu.unused == [], "nothing is known of the build"


def test_code_for_another_processor_is_not_run(fake: Fake) -> None:
    fake.opened = replace(LIBRARY, system_info={"CPU": BUILD | {"AVX512": "1"}})
    report = examine(Path("m.gguf"))
    assert not report.ok and fake.tested == 0 and report.model is None
    assert report.failures[0].startswith("The library was built for a processor with AVX512, which this one lacks")
    assert report.cpu.lacking == ["AVX512"]


def test_instructions_that_lie_idle_are_a_warning(fake: Fake) -> None:
    fake.has = fake.has | {"AVX512": True}
    report = examine(None)
    assert report.ok and report.cpu.unused == ["AVX512"]
    assert report.warnings[0].startswith("The library was built without AVX512, which this processor has")


def test_plain_loops_are_a_warning(fake: Fake) -> None:
    fake.opened = replace(LIBRARY, kernels="plain loops")
    assert "compiled to plain loops" in examine(None).warnings[0]


@pytest.mark.parametrize(
    ("how", "warning"),
    [
        (Spinning("kvlocal", "GOMP_SPINCOUNT=1", "/lib/libgomp.so.1"), None),
        (Spinning("environment", "OMP_WAIT_POLICY=active", "/lib/libgomp.so.1"), None),
        (Spinning("own", "poll=0"), None),
        (Spinning("earlier", "", "/lib/libgomp.so.1"), "(/lib/libgomp.so.1) was loaded before kvlocal"),
        (Spinning("other", "", "/lib/libomp.so"), "OMP_WAIT_POLICY=passive"),
    ],
)
def test_threads_that_spin_for_long_are_a_warning(how: Spinning, warning: str | None, fake: Fake) -> None:
    fake.opened = replace(LIBRARY, spinning=how)
    report = examine(None)
    assert report.ok and len(report.warnings) == (warning is not None)
    assert warning is None or warning in report.warnings[0]


def test_the_threads_come_with_their_reason(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: Cores(16, 8, 0, 1.5))
    cpu = examine(None).cpu
    assert (cpu.cores, cpu.threads) == (8, 2)
    assert cpu.threads_reason.endswith("limited to 1.5 by the control group")


def test_what_is_not_known_of_the_processor_is_not_held_against_it(fake: Fake) -> None:
    fake.has = {}
    report = examine(None)
    assert report.ok and report.warnings == [] and report.cpu.lacking == []


def test_layers_for_a_gpu_that_is_not_there(fake: Fake) -> None:
    assert "-ngl 9 has no effect" in examine(None, n_gpu_layers=9).warnings[0]
    assert examine(None).warnings == []
    fake.devices = [CPU_DEVICE, replace(CPU_DEVICE, kind="gpu")]
    assert examine(None, n_gpu_layers=9).warnings == []


def test_layers_on_a_device_leave_the_kernels(fake: Fake) -> None:
    pages = [Placement("CPU", 7, "tested on hardware"), Placement("CUDA0", 9, "portable path")]
    fake.model = replace(MODEL, pages=pages)
    (warning,) = examine(Path("m.gguf")).warnings
    assert warning.startswith("9 of 16 layers keep their pages on CUDA0, which has no page kernels: ")
    assert examine(Path("m.gguf"), kernels="portable").warnings == [], "it was asked for"
    fake.model = replace(MODEL, pages=pages[:1])
    assert examine(Path("m.gguf")).warnings == []


def test_kernels_that_ran_under_emulation_only_are_a_warning(fake: Fake) -> None:
    fake.model = replace(MODEL, pages=[Placement("Vulkan0", 16, "emulated only")])
    assert examine(Path("m.gguf")).warnings == [
        "16 of 16 layers keep their pages on Vulkan0, whose page kernels were tested under emulation only; "
        "--kernels portable goes without them."
    ]
    fake.model = replace(MODEL, pages=[Placement("CPU", 16, "emulated only")])
    assert examine(Path("m.gguf")).warnings == [], "the self-test ran them"


def test_a_model_that_cannot_be_paged_is_a_warning_and_one_that_cannot_be_read_a_failure(fake: Fake) -> None:
    fake.model = replace(MODEL, refused="It has no attention.", formats={})
    report = examine(Path("m.gguf"))
    assert report.ok
    assert report.warnings == ["Tiny cannot be paged, only --policy full runs it: It has no attention."]
    fake.model = KVError("m.gguf cannot be loaded.")
    report = examine(Path("m.gguf"))
    assert not report.ok and report.failures == ["m.gguf cannot be loaded."] and report.model is None


def test_places_follow_the_environment(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("KVLOCAL_CONFIG", str(tmp_path / "my.toml"))
    (tmp_path / "models").mkdir()
    places = {place.name: place for place in examine(None).places}
    assert (places["models"].path, places["models"].exists) == (str(tmp_path / "models"), True)
    assert (places["config file"].path, places["config file"].exists) == (str(tmp_path / "my.toml"), False)
    assert "Hugging Face cache" in places


# --- the library ---------------------------------------------------------------------------------------------------


def interpreter(folder: Path, code: str) -> str:
    """A program that ends as Python would when it runs into this."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    return str(script)


def test_a_library_that_kills_is_tried_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, code))
    monkeypatch.setattr("kvlocal.native.library.load", lambda: pytest.fail("it was loaded here"))
    library, fault = find_library()
    assert library.path is None
    assert fault.startswith(f"The native library ends the process that loads it ({signal.SIGILL.name}): it was built")


def test_a_library_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise KVError("The native library has ABI version 4.")

    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "raise SystemExit(1)"))
    monkeypatch.setattr("kvlocal.native.library.load", refuse)
    assert find_library()[1] == "The native library has ABI version 4."


def test_a_library_that_never_ends_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "import time; time.sleep(60)"))
    monkeypatch.setattr(installation, "_PROBE_SECONDS", 0.2)
    assert find_library()[1] == "Loading the native library takes more than 0.2 s."
