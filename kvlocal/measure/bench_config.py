"""What `kvlocal bench` measures, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlocal.errors import UsageError
from kvlocal.measure.variants import Variant, check_variants

_SLACK = 64  # tokens of room beyond what is ever decoded


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
        depths: tokens before what is measured.
        n_prompt: tokens of the batch whose speed is measured at each depth (0: not measured); n_gen: decoded tokens.
        repetitions: rounds at each depth.
        chunk: tokens between two evictions of chunked prefill.
        n_batch: most tokens given to llama.cpp at once; n_ubatch: most in one pass, and the steps of exact prefill.
        n_threads: 0: the physical cores.
        kernels: what computes attention over our cache; see :data:`kvlocal.settings.KERNELS`.
        evict_every: decoded tokens between two demotions of what has left the tail, the first of them after as many;
            an ``n_gen`` that is no multiple of it counts too few.
    """

    variants: tuple[Variant, ...]
    depths: tuple[int, ...] = (0, 4096)
    n_prompt: int = 512
    n_gen: int = 32
    repetitions: int = 3
    chunk: int = 512
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 0
    kernels: Literal["auto", "portable"] = "auto"
    evict_every: int = 32

    def __post_init__(self) -> None:
        if not self.variants or not self.depths:
            raise UsageError("There is nothing to measure; give at least one policy and one depth.")
        lowest = {"depths": 0, "n_prompt": 0, "n_gen": 0, "n_threads": 0}
        for name in (*lowest, "repetitions", "chunk", "n_batch", "n_ubatch", "evict_every"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < lowest.get(name, 1):
                    raise UsageError(f"{name} has {number}; it must be {lowest.get(name, 1)} or more.")
        check_variants(self.kernels, self.variants)
        if self.n_ctx >= 2**31:
            raise UsageError(f"A depth of {max(self.depths)} tokens is too large; give fewer than {2**31}.")

    @property
    def n_text(self) -> int:
        """Tokens of the text: the deepest measurement ends with it."""
        return max(self.depths) + max(self.n_prompt, self.n_gen, 1)

    @property
    def n_ctx(self) -> int:
        return self.n_text + _SLACK


@dataclass(frozen=True)
class Step:
    """What goes on: ``done`` of ``total`` tokens (``prefill``) or rounds (``measure``)."""

    depth: int
    label: str
    action: Literal["prefill", "measure"]
    done: int
    total: int


@dataclass(frozen=True)
class Result:
    """One variant at one depth; bytes, seconds and tokens per second; ``None`` where there was nothing to measure.

    Attributes:
        reads: the retriever, empty if everything is read.
        prefill_tps: median over the rounds of a batch of ``n_prompt`` tokens at this depth, after everything read so
            far (of chunked prefill: after what it kept); decode_tps: of ``n_gen`` tokens, one by one, after eviction,
            the demotions that fall due and the choice of what is read included.
        prompt_s: reading all ``depth`` tokens, without evictions; prompt_tps: their speed with evictions.
        evict_s: scores, allocation, moves and demotion of the one eviction at this depth (exact) or of all so far
            (chunked); ``None`` of what neither evicts nor demotes.
        ttft_s: ``prompt_s``, ``evict_s`` and the median step of decoding.
        held_mean: tokens held per layer and KV head while decoding; used_bytes: their K and V as they are stored.
        peak_bytes: most that the pools held at once to get here. Of ``full``, the share of its tokens: its buffer is
            allocated once, for the largest depth.
        full_bytes: what a full f16 cache would take.
        attention_bytes_per_token: stored K and V that attention reads for one decoded token, mean over the ``n_gen``.
    """

    model: str
    policy: str
    storage: str
    budget: str
    prefill: str
    reads: str
    depth: int
    n_prompt: int
    n_gen: int
    prefill_tps: float | None
    prefill_tps_min: float | None
    prefill_tps_max: float | None
    decode_tps: float | None
    decode_tps_min: float | None
    decode_tps_max: float | None
    prompt_s: float
    prompt_tps: float | None
    ttft_s: float | None
    evict_s: float | None
    held_mean: float
    used_bytes: int
    peak_bytes: int
    full_bytes: int
    attention_bytes_per_token: float | None
