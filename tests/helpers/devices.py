"""The device that tests of the native code run on: the CPU, or the accelerator that pytest is given with --device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvlocal.errors import UsageError
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.devices import list_devices
from kvlocal.native.model import Model

ALL_LAYERS = 99


@dataclass(frozen=True)
class Tolerance:
    """How much further results may lie from a reference than on the CPU, as factors."""

    values: float = 1
    """Of bounds on logits, scores and what is computed from keys."""
    kl: float = 1
    """Of bounds on the divergence of two distributions."""


TOLERANCES = {
    "CPU": Tolerance(),
    # products and flash attention take and add up f16 there, and sums are added in another order
    "Vulkan": Tolerance(values=4, kl=10),
}
"""By the name of a device without its number."""


@dataclass
class Device:
    """Where models are put.

    Attributes:
        name: as ggml calls it; n_gpu_layers: layers that models put there.
        tolerance: of this kind of device.
    """

    name: str = "CPU"
    n_gpu_layers: int = 0
    tolerance: Tolerance = TOLERANCES["CPU"]
    _has_kernels: bool | None = None

    @property
    def is_cpu(self) -> bool:
        return self.n_gpu_layers == 0

    def has_kernels(self, model: Path) -> bool:
        """Whether pages there have kernels: without them storage formats, rotation and mass are refused."""
        if self._has_kernels is None:
            try:
                loaded = Model(model, n_gpu_layers=self.n_gpu_layers)
                Context(loaded, ContextConfig(64, n_threads=1, formats=("q8",))).close()
                self._has_kernels = True
            except UsageError:
                self._has_kernels = False
        return self._has_kernels


chosen = Device()
"""The device of this run; set before the first test is collected."""


def choose(name: str) -> None:
    """Make this device the one that tests run on.

    Raises:
        ValueError: ggml does not see it, or sees several accelerators, of which models would use all.
    """
    accelerators = [device.name for device in list_devices() if device.kind not in ("cpu", "accel")]
    if accelerators != [name]:
        raise ValueError(f"--device {name}: the accelerators that ggml sees are {accelerators or 'none'}, not just it.")
    kind = name.rstrip("0123456789")
    chosen.name, chosen.n_gpu_layers, chosen.tolerance = name, ALL_LAYERS, TOLERANCES[kind]


def within(bound: float) -> float:
    """A bound of the CPU on logits, scores and what is computed from keys, as it is on the chosen device."""
    return bound * chosen.tolerance.values


def kl_within(bound: float) -> float:
    """Likewise for divergences."""
    return bound * chosen.tolerance.kl
