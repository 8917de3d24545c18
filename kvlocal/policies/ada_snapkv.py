"""Ada-SnapKV: heads of a layer compete for its slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.errors import UsageError
from kvlocal.policies.parts.ranked import ALPHA, SAFEGUARD
from kvlocal.policies.parts.scoring import Ints
from kvlocal.policies.parts.view import LayerView
from kvlocal.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaSnapKV(SnapKV):
    """Like SnapKV, but the heads of a layer compete: spread-out heads get more slots, concentrated ones fewer.

    Paper: Feng et al., *Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference*, arXiv:2407.11550.

    Formula, per layer with SnapKV scores ``S[h]``, ``T`` slots to give to the prefix, ``u`` = SnapKV's equal counts::

        f[h] = how many of the T largest entries of all heads together lie in head h      (sum(f) == T)
        mix:      B[h] = (1 - alpha) f[h] + alpha u[h],  rounded by largest remainder: sum(B) == T
        protect:  as f, after reserving floor(alpha u[h]) best entries of every head
        keep[h] = sinks + top-B[h](S[h]) + window

    Kept attention mass: f >= protect >= mix >= SnapKV. ``alpha=0`` is purely adaptive, ``alpha=1`` is SnapKV. Order of
    equal scores: rank inside the head, then head.

    Shapes: reads ``[n_head, n]`` scores per layer, sorts ``[H, n]``. Cost: O(H n log n) per layer.
    Limits: heads are ragged afterwards. Window scores and pooling are stand-ins for future attention, so the theory
    (the bound on the layer's output error) holds for the scored window only.

    ``compat="adakv"`` rounds as that repository does (mix only, the layer total drifts); ``compat="kvpress"`` reserves
    ``int(alpha * kept)`` entries of every head, counting the window, and ignores ``safeguard``.
    """

    name: ClassVar[str] = "ada-snapkv"
    paper: ClassVar[str] = "Ada-KV, arXiv:2407.11550"

    alpha: float = ALPHA
    safeguard: str = SAFEGUARD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat == "adakv" and self.safeguard == "protect":
            raise UsageError("compat=adakv knows no safeguard=protect: use safeguard=mix, or leave out compat.")

    def head_counts(self, layer: LayerView, total: int) -> Ints:
        return self.ada_counts(layer, total, self.alpha, self.safeguard, self.compat)
