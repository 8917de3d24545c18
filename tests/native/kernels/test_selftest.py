"""The doctor's self-test: it passes here, and every kind of broken kernel is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contexts import OpenModel

from kvlocal.doctor import installation, kernels, rows, selftest
from kvlocal.doctor.installation import find_library
from kvlocal.doctor.report import _model
from kvlocal.doctor.selftest import Comparison, self_test
from kvlocal.errors import KVError
from kvlocal.native import library
from kvlocal.native.devices import TESTED, Placement, list_devices
from kvlocal.native.formats import FORMATS
from kvlocal.native.model import Model


def failed(found: list[Comparison]) -> list[str]:
    return [each.name for each in found if not each.passed]


def test_all_of_it_passes_here() -> None:
    steps: list[str] = []
    found = self_test(2, steps.append)
    assert failed(found) == []
    assert steps == ["logits", "rows", "attention"]
    names = [each.name for each in found]
    assert len(names) == 4 + 2 * len(FORMATS) == len(set(names))
    assert all(f"rows of {name}" in names and f"attention over {name}" in names for name in FORMATS)
    # what is compared is not one and the same
    assert all(each.error for each in found if not each.name.startswith("rows"))


def change(monkeypatch: pytest.MonkeyPatch, name: str, by: Callable[..., Any], when: Callable[..., bool]) -> None:
    """Make a function of the kernels or of the rows give something else for some arguments."""
    module = kernels if hasattr(kernels, name) else rows
    right = getattr(module, name)

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return by(out) if when(*args, **options) else out

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize("amount", [0.01, math.nan])
def test_a_logit_that_differs_is_seen(amount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.logits

    def wrong(model: Model, *, portable: bool, n_threads: int = 0) -> dict[str, Any]:
        out = right(model, portable=portable, n_threads=n_threads)
        if portable:
            after = next(name for name in out if name.startswith("after an eviction: decode"))
            out[after][-1, 7] += amount * np.ptp(out[after])
        return out

    monkeypatch.setattr(selftest, "logits", wrong)
    (broken,) = (each for each in selftest.compare_logits(1) if not each.passed)
    assert broken.name == "after an eviction: decode of 8 tokens"
    assert broken.error is None if math.isnan(amount) else broken.error == pytest.approx(amount, rel=0.1)


@pytest.mark.parametrize("row", ["q8", "kv3", "kivi4-64-k", "token2"])
def test_a_value_that_is_decoded_differently_is_seen(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def by(out: Any) -> Any:
        out[1, 3] = np.nextafter(out[1, 3], np.float32(np.inf))
        return out

    change(monkeypatch, "decode_rows", by, lambda kind, _stored, plain=False: kind == row and not plain)
    assert failed(list(selftest.compare_rows())) == [f"rows of {row[:4] if row.startswith('kivi') else row}"]


@pytest.mark.parametrize("few", [False, True])
def test_attention_that_differs_is_seen(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def by(out: Any) -> Any:
        out[0][0, 1, 2] += 1e-3
        return out

    def when(q: Any, *_: Any, stored: Any = None, **__: Any) -> bool:
        return (len(q) == 1) == few and stored is not None and stored[0][0] == ("kivi2-64-k", "kivi2-64")

    change(monkeypatch, "attend_pages", by, when)
    assert failed(list(selftest.compare_attention(1))) == ["attention over kivi"]


def test_what_cannot_run_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise KVError("The disk is full.")

    monkeypatch.setattr(selftest, "write_random_model", refuse)
    found = self_test(1)
    assert failed(found) == ["logits"]
    assert found[0].detail == "The disk is full." and len(found) == 1 + 2 * len(FORMATS)


def test_the_kernels_must_be_what_runs(open_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the portable path twice, both would agree to the bit and nothing would have been tested."""
    config = selftest.ContextConfig
    monkeypatch.setattr(selftest, "ContextConfig", lambda **options: config(**(options | {"portable": True})))
    with pytest.raises(KVError, match="page kernels"):
        selftest.logits(open_model("llama", n_layer=1), portable=False)


# --- the installation ---------------------------------------------------------------------------------------------


def test_the_library_is_ours_and_says_what_it_is() -> None:
    found, fault = find_library()
    folder = library.installed("lib")
    assert fault == "" and found.ours is True
    assert found.path is not None and Path(found.path).parent == folder
    assert (found.abi, found.llama_cpp_commit) == (library.ABI_VERSION, library.load().commit)
    assert "CPU" in found.system_info and found.binding not in (None, "unknown")


def test_a_second_ggml_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_mapped", lambda: ["/usr/lib/libggml-base.so"])
    library, fault = find_library()
    assert library.ours is False
    assert "second llama.cpp" in fault and fault.endswith(": /usr/lib/libggml-base.so; import only one of them.")


def test_what_is_mapped_is_found() -> None:
    """As far as the system tells at all."""
    library.load()
    mapped = installation._mapped()
    assert not mapped or {"libllama", "libggml-base"} <= {Path(path).stem for path in mapped}


def test_the_processor_is_a_device() -> None:
    library.load()
    devices = list_devices()
    (cpu,) = (each for each in devices if each.kind == "cpu")
    assert (cpu.name, cpu.backend) == ("CPU", "CPU")
    assert cpu.kernels != "portable path" and (cpu.tested in TESTED.values())
    assert all(0 <= each.free_bytes <= each.total_bytes for each in devices)


def test_libraries_are_found_by_their_whole_name() -> None:
    assert library.open_library("ggml")._name != library.open_library("ggml-base")._name
    with pytest.raises(KVError, match="There is no library ggm in "):
        library.open_library("ggm")


# --- models -------------------------------------------------------------------------------------------------------


def test_formats_that_heads_cannot_be_stored_in_come_with_the_reason(open_model: OpenModel) -> None:
    path = open_model("llama", n_layer=1, n_head=4, n_head_kv=2, head_dim=80).path
    info = _model(path, 0, list_devices(), portable=False)
    assert (info.refused, info.architecture) == (None, "llama")
    assert info.formats["f16"] is None
    assert info.formats["kv3"] is not None and "80" in info.formats["kv3"]


@pytest.mark.parametrize("n_gpu_layers", [0, 2])
def test_the_pages_of_layers_are_found_on_their_device(n_gpu_layers: int, open_model: OpenModel) -> None:
    """Without an accelerator, layers that are meant for one stay in main memory."""
    devices = list_devices()
    (cpu,) = (each for each in devices if each.name == "CPU")
    path = open_model("llama", n_layer=3).path
    info = _model(path, n_gpu_layers, devices, portable=False)
    assert info.pages == [Placement("CPU", 3, cpu.kernels)] and set(info.formats.values()) == {None}


def test_a_portable_context_has_no_kernels_and_stores_f16_alone(open_model: OpenModel) -> None:
    info = _model(open_model("llama", n_layer=3).path, 0, list_devices(), portable=True)
    assert info.pages == [Placement("CPU", 3, "portable path")]
    assert [name for name, reason in info.formats.items() if reason is None] == ["f16"]
