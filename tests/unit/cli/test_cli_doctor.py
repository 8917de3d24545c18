"""`kvlocal doctor` with a report that is made up: the text to the letter, the JSON object, exit codes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import call, fail, sentence
from kvlocal_cli.backend import machine as backend_machine
from kvlocal_cli.options.settings import Settings

from kvlocal.doctor import report as doctor
from kvlocal.doctor.installation import Library
from kvlocal.doctor.report import Cpu, Memory, ModelInfo, Place, Report
from kvlocal.doctor.selftest import Comparison
from kvlocal.errors import KVError, UsageError
from kvlocal.native.devices import Device, HardwareTest, Placement
from kvlocal.native.spinning import Spinning

GIB = 2**30
REPORT = Report(
    versions={"kvlocal": "1.2.3", "python": "3.12.1"},
    library=Library(
        path="/opt/kvlocal/lib/libllama.so",
        folder="/opt/kvlocal/lib",
        binding="0.3.36",
        binding_path="/opt/kvlocal/binding",
        llama_cpp_commit="0c1e57098",
        abi=7,
        ours=True,
        kernels="AVX2",
        spinning=Spinning("kvlocal", "GOMP_SPINCOUNT=7", "/lib/libgomp.so.1"),
        system_info={"CPU": {"AVX2": "1", "FMA": "1", "SVE_CNT": "16"}},
    ),
    cpu=Cpu(
        "Fast Chip 9",
        "x86_64",
        4,
        4,
        "4 physical cores of 8 usable processors",
        ["AVX2", "FMA", "AVX512"],
        ["AVX2", "FMA"],
        [],
        ["AVX512"],
    ),
    devices=[
        Device(
            "CPU",
            "Fast Chip 9",
            "cpu",
            "CPU",
            GIB,
            GIB,
            "tested on hardware",
            HardwareTest("2026-01-31", "Fast Chip 8"),
        ),
        Device("CUDA0", "Big GPU", "gpu", "CUDA", 6 * GIB, 8 * GIB, "portable path"),
    ],
    memory=Memory(16 * GIB, 12 * GIB, 0, 0),
    places=[Place("models", "/home/ann/models", True), Place("config file", "/etc/config.toml", False)],
    model=ModelInfo(
        path="/home/ann/m.gguf",
        name="Tiny",
        description="llama 1B Q4_0",
        architecture="llama",
        n_ctx_train=8192,
        size_bytes=GIB // 2,
        refused=None,
        formats={"f16": None, "q8": None, "kv3": "blocks of 64 values do not fit heads of 80"},
        pages=[Placement("CPU", 13, "tested on hardware"), Placement("CUDA0", 3, "portable path")],
    ),
    tests=[
        Comparison("prefill of 333 tokens", 1.2e-6, 2e-4, "range of the logits"),
        Comparison("rows of q8", 0.0, 0.0),
    ],
    failures=[],
    warnings=["3 of 16 layers keep their pages on an accelerator."],
)
TEXT = """\
Versions
  kvlocal             1.2.3
  python              3.12.1

Library
  path                /opt/kvlocal/lib/libllama.so
  binding             llama-cpp-python 0.3.36, /opt/kvlocal/binding
  llama.cpp           0c1e57098, KVL ABI 7
  ours                yes
  page kernels        AVX2
  waiting threads     spin a little, then sleep (GOMP_SPINCOUNT=7, /lib/libgomp.so.1)
  CPU built with      AVX2 FMA SVE_CNT=16

Processor
  name                Fast Chip 9 (x86_64)
  threads             4: 4 physical cores of 8 usable processors
  has                 AVX2 FMA AVX512
  unused by the build AVX512

Devices
  CPU                 Fast Chip 9 (cpu, backend CPU), 1.00 GiB of 1.00 GiB free
  page kernels        tested on hardware (Fast Chip 8, 2026-01-31)
  CUDA0               Big GPU (gpu, backend CUDA), 6.00 GiB of 8.00 GiB free
  page kernels        none: portable path

Memory
  RAM                 12.00 GiB of 16.00 GiB free
  swap                none

Paths
  models              ~/models
  config file         /etc/config.toml (not there)

Model
  path                ~/m.gguf
  name                Tiny
  architecture        llama (llama 1B Q4_0, 512.0 MiB, trained for 8,192 tokens)
  can be paged        yes
  pages               13 layers on CPU: tested on hardware
                      3 layers on CUDA0: portable path
  can be stored in    f16 q8
  not in kv3          blocks of 64 values do not fit heads of 80

Self-test: largest error, and what is allowed
  PASS  prefill of 333 tokens   1.2e-06  2e-04 of the range of the logits
  PASS  rows of q8                    0      0

warning: 3 of 16 layers keep their pages on an accelerator.
Nothing failed, 1 warning.
"""


class Fake:
    def __init__(self) -> None:
        self.report = REPORT
        self.settings: Settings | None = None

    def examine(self, settings: Settings, _screen: Any) -> dict[str, Any]:
        self.settings = settings
        return self.report.as_dict()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(backend_machine, "examine", fake.examine)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    return fake


def test_the_report_can_be_pasted(fake: Fake) -> None:
    result = call("doctor", "model.gguf", "-ngl", "3", "-t", "2", "--kernels", "portable")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == TEXT
    assert fake.settings is not None
    assert fake.settings == Settings(model="model.gguf", n_gpu_layers=3, n_threads=2, kernels="portable")


def tail(fake: Fake, **changes: Any) -> list[str]:
    """What follows the model in a report that fails."""
    fake.report = replace(REPORT, warnings=[], **changes)
    result = call("doctor")
    assert (result.exit_code, result.stderr) == (1, "")
    return result.stdout[result.stdout.index("Self-test") :].splitlines()


def test_a_test_that_fails_is_exit_code_1(fake: Fake) -> None:
    tests = [
        Comparison("decode", 0.125, 2e-4, "range of the logits"),
        Comparison("rows of q4", None, 0.0),
        Comparison("attention", None, 0.0, detail="The graph in /home/ann/x failed."),
    ]
    assert tail(fake, tests=tests) == [
        "Self-test: largest error, and what is allowed",
        "  FAIL  decode       1.2e-01  2e-04 of the range of the logits",
        "  FAIL  rows of q4  not a number      0",
        "  FAIL  attention   The graph in ~/x failed.",
        "",
        "3 failures.",
    ]


def test_a_library_that_cannot_be_loaded_is_exit_code_1(fake: Fake) -> None:
    failure = "The native library ends the process that loads it (SIGILL)."
    library = Library(folder="/home/ann/lib")
    assert tail(fake, library=library, tests=[], devices=[], model=None, failures=[failure]) == [
        "Self-test: not run",
        "",
        f"FAIL: {failure}",
        "1 failure.",
    ]
    text = call("doctor").stdout
    assert "\nLibrary\n  path                nothing could be loaded from ~/lib\n\n" in text
    assert "\nDevices\n  none\n" in text
    assert "\nModel\n  none                (`kvlocal pull` fetches the default one)\n" in text


def test_a_model_that_cannot_be_paged_says_why(fake: Fake) -> None:
    assert REPORT.model is not None
    model = replace(REPORT.model, refused="Mamba has no attention.", formats={}, pages=[])
    fake.report = replace(REPORT, model=model)
    assert "  can be paged        no: Mamba has no attention.\n\n" in call("doctor").stdout


def test_json_is_one_object_with_all_of_it(fake: Fake) -> None:
    result = call("doctor", "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert list(values) == ["ok", *Report.__dataclass_fields__]
    assert values["ok"] is True and values["cpu"]["unused"] == ["AVX512"]
    assert values["tests"][0] == {
        "name": "prefill of 333 tokens",
        "error": 1.2e-6,
        "tolerance": 2e-4,
        "unit": "range of the logits",
        "detail": "",
        "passed": True,
    }
    fake.report = replace(REPORT, failures=["It is broken."])
    result = call("doctor", "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)


# --- from the command line to the examination --------------------------------------------------------------------


class Screen:
    """A screen that shows nothing."""

    def __init__(self) -> None:
        self.console = self

    def download(self) -> Any:
        return nullcontext(lambda *_: None)

    def status(self, _text: Any) -> Any:
        return nullcontext(self)

    def update(self, text: Any) -> None:
        self.shown = str(text)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `kvlocal.doctor.report.examine` was given."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def examine(model: Any, **options: Any) -> Report:
        options.pop("on_step")("self-test: rows of q8")
        calls.append((model, options))
        return REPORT

    monkeypatch.setattr(doctor, "examine", examine)
    return calls


@pytest.mark.parametrize("default", [None, Path("default.gguf")])
def test_without_a_model_nothing_is_fetched(
    default: Path | None, examined: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlocal.models.default.fetched_default", lambda: default)
    monkeypatch.setattr("kvlocal.models.resolve.resolve_model", fail(AssertionError("fetched")))
    screen: Any = Screen()
    backend_machine.examine(Settings(n_gpu_layers=5, n_threads=2, kernels="portable"), screen)
    assert examined == [(default, {"n_gpu_layers": 5, "n_threads": 2, "kernels": "portable", "failures": []})]
    assert screen.shown == "Self-test: rows of q8"


def test_a_model_that_cannot_be_fetched_is_a_failure_among_others(
    examined: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(_spec: str, **_: Any) -> Path:
        raise KVError("The network is down.")

    monkeypatch.setattr("kvlocal.models.resolve.resolve_model", resolve)
    screen: Any = Screen()
    backend_machine.examine(Settings(model="hf:u/r"), screen)
    assert examined[0][0] is None and examined[0][1]["failures"] == ["The network is down."]


def test_a_model_that_is_none_is_a_usage_error(examined: list[Any], tmp_path: Path) -> None:
    assert sentence("doctor", str(tmp_path / "no.gguf")).startswith("there is no model file")
    with pytest.raises(UsageError):
        screen: Any = Screen()
        backend_machine.examine(Settings(model=str(tmp_path)), screen)
    assert examined == []
