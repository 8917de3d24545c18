"""The report of `kvlocal doctor`: versions, library, processor, devices, memory, paths, a model, and their faults.

report = examine(None)
report.ok, report.failures, report.warnings
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import platformdirs
import psutil

import kvlocal
from kvlocal import settings
from kvlocal.doctor.installation import Library, find_library
from kvlocal.doctor.selftest import Comparison, self_test
from kvlocal.errors import KVError, UsageError
from kvlocal.measure.machine import cpu_features, cpu_name
from kvlocal.models.folder import models_dir
from kvlocal.models.hub import hub_cache
from kvlocal.models.template import chat_tokens, has_template
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.devices import Device, Placement, list_devices, placements
from kvlocal.native.formats import FORMATS
from kvlocal.native.model import Model
from kvlocal.native.names import plain_line
from kvlocal.native.spinning import SPINS
from kvlocal.native.threads import usable_cores

_PACKAGES = ("numpy", "gguf", "huggingface_hub")


@dataclass(frozen=True)
class Cpu:
    """Name, physical cores this process may use, instruction sets of the machine and of the build by llama.cpp's names.

    ``threads``: how many compute by default, and in ``threads_reason`` why so many.
    ``lacking``: in the build, not in the machine; ``unused``: in the machine, not in the build.
    """

    name: str
    architecture: str
    cores: int
    threads: int
    threads_reason: str
    features: list[str]
    built_for: list[str]
    lacking: list[str]
    unused: list[str]


@dataclass(frozen=True)
class Memory:
    """Of the machine, bytes; available without swapping."""

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int


@dataclass(frozen=True)
class Place:
    """A file or folder that kvlocal uses, and whether it exists."""

    name: str
    path: str
    exists: bool


@dataclass(frozen=True)
class ModelInfo:
    """A model, and what the paged cache can do with it.

    Attributes:
        pages: where its layers have their pages, and how attention over them is computed; empty if it cannot be paged.
        refused: why it cannot be paged, None if it can.
        formats: per storage format why its heads cannot be stored so, None if they can.
        template: why its chat template cannot be used, None if it can or there is none.
    """

    path: str
    name: str
    description: str
    architecture: str
    n_ctx_train: int
    size_bytes: int
    refused: str | None
    formats: dict[str, str | None]
    pages: list[Placement] = field(default_factory=list)
    template: str | None = None


@dataclass(frozen=True)
class Report:
    """All of it. ``failures`` and ``warnings`` are sentences; ``tests`` is empty where the library cannot run."""

    versions: dict[str, str]
    library: Library
    cpu: Cpu
    devices: list[Device]
    memory: Memory
    places: list[Place]
    model: ModelInfo | None
    tests: list[Comparison]
    failures: list[str]
    warnings: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        return not self.failures and all(test.passed for test in self.tests)

    def as_dict(self) -> dict[str, Any]:
        values = {"ok": self.ok} | asdict(self)
        for test, row in zip(self.tests, values["tests"], strict=True):
            row["passed"] = test.passed
        return values


def examine(
    model: Path | None,
    *,
    n_gpu_layers: int = 0,
    n_threads: int = 0,
    kernels: Literal["auto", "portable"] = settings.KERNELS.default,
    failures: Sequence[str] = (),
    on_step: Callable[[str], None] = lambda _what: None,
) -> Report:
    """Examine everything; faults are reported, never raised.

    Args:
        model: a GGUF file to look at as well.
        n_gpu_layers: layers of it to put on an accelerator; n_threads: of the self-test, 0: the default.
        kernels: what computes its attention; see :data:`kvlocal.settings.KERNELS`.
        failures: what is known to be wrong already.
        on_step: told what comes next.
    """
    found, warnings = list(failures), list[str]()
    on_step("loading the library")
    library, fault = find_library()
    found += [fault] if fault else []
    cpu = _cpu(library)
    _judge_cpu(cpu, library, found, warnings)
    _judge_spinning(library, warnings)
    devices = list_devices() if library.path else []
    info, tests = None, list[Comparison]()
    # code for another processor ends the process
    if library.path and not cpu.lacking:
        if n_gpu_layers and all(device.kind in ("cpu", "accel") for device in devices):
            warnings.append(
                f"-ngl {n_gpu_layers} has no effect: ggml sees no GPU (kvlocal was built without, or none is visible)."
            )
        tests = self_test(n_threads, lambda part: on_step(f"self-test: {part}"))
        if model is not None:
            on_step(f"loading {model.name}")
            try:
                info = _model(model, n_gpu_layers, devices, portable=kernels == "portable")
            except KVError as error:
                found.append(str(error))
            else:
                found += [info.template] if info.template else []
                _judge_model(info, warnings, portable=kernels == "portable")
    return Report(_versions(), library, cpu, devices, _memory(), _places(), info, tests, found, warnings)


#
# versions, machine, places
#


def _versions() -> dict[str, str]:
    system = platform.platform()
    out = {"kvlocal": kvlocal.__version__, "python": f"{platform.python_version()}", "system": system}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def _cpu(library: Library) -> Cpu:
    machine = cpu_features()
    build = {name for name, value in library.system_info.get("CPU", {}).items() if value == "1"}
    built = [name for name in machine if name in build]
    has = [name for name in machine if machine[name]]
    usable = usable_cores()
    return Cpu(
        name=cpu_name(),
        architecture=platform.machine(),
        cores=usable.physical,
        threads=usable.threads,
        threads_reason=usable.reason,
        features=has,
        built_for=built,
        lacking=[name for name in built if name not in has],
        unused=[name for name in has if name not in built] if library.path else [],
    )


def _judge_cpu(cpu: Cpu, library: Library, failures: list[str], warnings: list[str]) -> None:
    if cpu.lacking:
        failures.append(
            f"The library was built for a processor with {', '.join(cpu.lacking)}, which this one lacks: it can crash. "
            "Nothing was computed; reinstall kvlocal from its source on this machine."
        )
    if cpu.unused:
        warnings.append(
            f"The library was built without {', '.join(cpu.unused)}, which this processor has: reinstalling kvlocal "
            "from its source on this machine may make it faster."
        )
    if library.kernels == "plain loops":
        warnings.append("The page kernels were compiled to plain loops, without vector instructions: they are slow.")


def _judge_spinning(library: Library, warnings: list[str]) -> None:
    how = library.spinning
    if how is not None and how.source in ("earlier", "other"):
        why = "was loaded before kvlocal" if how.source == "earlier" else "takes no setting of kvlocal's"
        warnings.append(
            f"The OpenMP library ({how.runtime or 'not GNU OpenMP'}) {why}, so that waiting threads spin as long as it "
            "likes, and decoding is slow beside other work: "
            + (
                f"import kvlocal first, or set GOMP_SPINCOUNT={SPINS} before Python starts."
                if how.source == "earlier"
                else "set OMP_WAIT_POLICY=passive before Python starts."
            )
        )


def _memory() -> Memory:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return Memory(memory.total, memory.available, swap.total, swap.free)


def _places() -> list[Place]:
    # a config file may be named, as any setting, by the environment
    config = os.environ.get("KVLOCAL_CONFIG") or platformdirs.user_config_path("kvlocal") / "config.toml"
    places: dict[str, Path | None] = {
        "models": models_dir(),
        "Hugging Face cache": hub_cache(),
        "evaluation records": platformdirs.user_cache_path("kvlocal") / "eval",
        "archives": platformdirs.user_cache_path("kvlocal") / "archive",
        "config file": Path(config),
        "state": platformdirs.user_state_path("kvlocal"),
    }
    paths = ((name, path.expanduser()) for name, path in places.items() if path is not None)
    return [Place(name, str(path), path.exists()) for name, path in paths]


#
# the model
#


def _model(path: Path, n_gpu_layers: int, devices: Sequence[Device], *, portable: bool) -> ModelInfo:
    model = Model(path, n_gpu_layers=n_gpu_layers)
    try:
        refused = None
        try:
            model.check_paged()
        except KVError as error:
            refused = str(error)
        reasons: dict[str, str | None] = {}
        for name in FORMATS if refused is None else ():
            if portable and name != "f16":
                reasons[name] = "stock operators (--kernels portable) read f16 only"
            else:
                reasons[name] = None if model.stores(name) else model.native.last_error()
        description = ctypes.create_string_buffer(256)
        model.llama.llama_model_desc(model.handle, description, len(description))
        return ModelInfo(
            path=str(path),
            name=model.name,
            description=description.value.decode("utf-8", "replace"),
            architecture=plain_line(model.meta("general.architecture") or "") or "unknown",
            n_ctx_train=model.n_ctx_train,
            size_bytes=int(model.llama.llama_model_size(model.handle)),
            refused=refused,
            formats=reasons,
            pages=_pages(model, devices, portable) if refused is None else [],
            template=_template_fault(model),
        )
    finally:
        model.close()


def _template_fault(model: Model) -> str | None:
    """Why the chat template cannot be used, ``None`` if it can or there is none."""
    try:
        if has_template(model):
            chat_tokens(model, [{"role": "user", "content": "Hello"}])
    except UsageError as error:
        return str(error)
    return None


def _pages(model: Model, devices: Sequence[Device], portable: bool) -> list[Placement]:
    config = ContextConfig(n_ctx=64, n_batch=32, n_window=0, portable=portable)
    with Context(model, config) as context:
        assert context.cache is not None
        return placements(context.cache.layers, devices)


def _judge_model(model: ModelInfo, warnings: list[str], *, portable: bool) -> None:
    if model.refused is not None:
        warnings.append(f"{model.name} cannot be paged, only --policy full runs it: {model.refused}")
    n_layer = sum(place.n_layer for place in model.pages)
    for place in model.pages:
        some = f"{place.n_layer} of {n_layer} layers keep their pages on {place.device}"
        if place.kernels == "portable path" and not portable:
            warnings.append(
                f"{some}, which has no page kernels: attention of these layers is computed by llama.cpp's own "
                "operators, the ladder stores all in f16, and what needs the kernels is refused: every --kv but f16, "
                "policies that accumulate attention."
            )
        # those of the CPU were compared on this very one
        elif place.kernels == "emulated only" and place.device != "CPU":
            warnings.append(
                f"{some}, whose page kernels were tested under emulation only; --kernels portable goes without them."
            )
