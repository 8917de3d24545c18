"""Checks in a second, on random data, that the kernels compute correctly on this machine.

Three kinds of comparison. Logits of a tiny random model with the page kernels against the portable path, which is made
of llama.cpp's own operators. Rows of every storage format, decoded by vector code against plain loops. Attention that
reads pages of a format in place against attention in f64 over what plain loops decode.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.doctor import kernels, rows
from kvlocal.errors import KVError
from kvlocal.models.f32 import to_f32
from kvlocal.models.random import Shape, write_random_model
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.formats import FORMATS, PAGE_SLOTS
from kvlocal.native.model import Model
from kvlocal.native.threads import default_threads

LOGITS_TOLERANCE = 2e-4
"""Largest difference of a logit over the range of all logits. Weights are F32, so that f32 sums in another order are
all that differs; some 1e-6 is usual."""
ROWS_TOLERANCE = 0.0
"""Largest difference of a decoded value: vector code gives the bits of the plain loops."""
ATTENTION_TOLERANCE = 2e-5
"""Largest difference of an output over the largest output: f32 sums against f64."""

MODEL = Shape("self-test", "llama", 2, 256, 6, 2, 64, 256, 320, 10000.0, 1024, tied=True)
N_PREFILL, N_DECODE, N_MORE = 333, 8, 100

_ROWS = {name: ((name, name),) for name in FORMATS} | {
    "kv3": (("kv3", "kv2"),),
    "kivi": tuple((f"kivi{b}-{group}-k", f"kivi{b}-{group}") for b in (2, 4) for group in (32, 64)),
}
"""Rows of keys and of values of every format."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, the largest difference found (None: it is not a number), and the largest that is allowed.

    ``unit``: what the difference is relative to, empty if to nothing; ``detail``: why nothing could be compared.
    """

    name: str
    error: float | None
    tolerance: float
    unit: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool:
        return not self.detail and self.error is not None and self.error <= self.tolerance


def self_test(n_threads: int = 0, on_step: Callable[[str], None] = lambda _name: None) -> list[Comparison]:
    """All comparisons, with ``n_threads`` threads (0: the default); what cannot run is one that failed.

    ``on_step`` is told what comes next.
    """
    parts: tuple[tuple[str, Callable[[], Iterator[Comparison]]], ...] = (
        ("logits", lambda: compare_logits(n_threads)),
        ("rows", compare_rows),
        ("attention", lambda: compare_attention(n_threads)),
    )
    out: list[Comparison] = []
    for name, part in parts:
        on_step(name)
        try:
            out += part()
        except (KVError, OSError, AssertionError) as error:
            out.append(Comparison(name, None, 0.0, detail=str(error) or type(error).__name__))
    return out


def _largest(difference: npt.NDArray[Any], scale: float = 1.0) -> float | None:
    """Largest magnitude over ``scale``; None if it is no finite number."""
    error = float(np.abs(difference).max()) / scale
    return error if np.isfinite(error) else None


#
# logits
#


def compare_logits(n_threads: int = 0) -> Iterator[Comparison]:
    """The page kernels against the portable path: nothing evicted, and after an eviction."""
    with tempfile.TemporaryDirectory(prefix="kvlocal-", ignore_cleanup_errors=True) as folder:
        # on quantized weights a difference in the last bit becomes a large one
        path = to_f32(write_random_model(MODEL, Path(folder) / "q4.gguf"), Path(folder) / "f32.gguf")
        model = Model(path)
        try:
            used, wanted = (logits(model, portable=portable, n_threads=n_threads) for portable in (False, True))
        finally:
            model.close()
    for name, reference in wanted.items():
        spread = float(np.ptp(reference)) or 1.0
        yield Comparison(name, _largest(used[name] - reference, spread), LOGITS_TOLERANCE, "range of the logits")


def logits(model: Model, *, portable: bool, n_threads: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Logits ``[tokens, n_vocab]`` of the same steps for every context.

    Raises:
        KVError: the page kernels should run and do not.
    """
    tokens = np.random.default_rng(0).integers(3, model.n_vocab, N_PREFILL + 2 * (N_DECODE + N_MORE)).astype(np.int32)
    config = ContextConfig(n_ctx=1024, n_outputs=512, n_threads=n_threads, portable=portable)
    with Context(model, config) as context:
        cache = context.cache
        assert cache is not None
        if not portable:
            # refused where attention is made of llama.cpp's operators: both paths would be one
            cache.accumulate_mass("sum")
            cache.accumulate_mass("none")
        at = 0

        def read(n: int) -> npt.NDArray[np.float32]:
            nonlocal at
            context.decode(tokens[at : at + n], at, outputs="all")
            at += n
            return context.logits(n)

        def one_by_one() -> npt.NDArray[np.float32]:
            return np.concatenate([read(1) for _ in range(N_DECODE)])

        out = {f"prefill of {N_PREFILL} tokens": read(N_PREFILL), f"decode of {N_DECODE} tokens": one_by_one()}
        _evict(context)
        out[f"after an eviction: decode of {N_DECODE} tokens"] = one_by_one()
        out[f"after an eviction: prefill of {N_MORE} tokens"] = read(N_MORE)
        return out


def _evict(context: Context) -> None:
    """Keep another number of slots in every head, the same in every context."""
    assert context.cache is not None
    rng = np.random.default_rng(7)
    for layer in range(len(context.cache.layers)):
        lengths = context.cache.lengths(0, layer)
        context.cache.keep(0, layer, [np.sort(rng.choice(n, rng.integers(9, n), replace=False)) for n in lengths])


#
# storage formats
#


def compare_rows() -> Iterator[Comparison]:
    """Vector code that decodes rows against plain loops, for every format."""
    # heavy tails, and some channels far larger than the others
    x = np.random.default_rng(1).standard_t(3, (128, 128)).astype(np.float32)
    x[:, ::29] *= 40
    for name, pairs in _ROWS.items():
        errors = []
        for row in {row for pair in pairs for row in pair}:
            stored = rows.encode_rows(row, x)
            errors.append(_largest(rows.decode_rows(row, stored) - rows.decode_rows(row, stored, plain=True)))
        yield Comparison(f"rows of {name}", _worst(errors), ROWS_TOLERANCE)


def compare_attention(n_threads: int = 0) -> Iterator[Comparison]:
    """The page kernels over pages of every format against attention in f64 over what plain loops decode."""
    threads, n_slots, d = n_threads or default_threads(), 300, 128
    rng = np.random.default_rng(2)
    keys, values = ([rng.standard_normal((n_slots, d)).astype(np.float16) for _ in range(2)] for _ in range(2))
    for name, pairs in _ROWS.items():
        errors = []
        for pair in pairs:
            pages = _pages(pair, n_slots)
            seen = [[_decoded(x, [p[i] for p in pages]) for x in xs] for i, xs in enumerate((keys, values))]
            # few rows and many go through different kernels
            for n_tokens in (1, 40):
                q = rng.standard_normal((n_tokens, 6, d)).astype(np.float32)
                got, _ = kernels.attend_pages(
                    q, keys, values, n_split=3, n_threads=threads, stored=None if name == "f16" else [pages] * 2
                )
                want, _ = kernels.reference(q, *seen)
                errors.append(_largest(got - want, float(np.abs(want).max())))
        yield Comparison(f"attention over {name}", _worst(errors), ATTENTION_TOLERANCE, "largest output")


def _worst(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return max(known) if len(known) == len(errors) else None


def _pages(pair: tuple[str, str], n_slots: int) -> list[tuple[str, str]]:
    """Full pages, or groups of them, in one format; what is left in f16."""
    group = max(PAGE_SLOTS, rows.group_slots(pair[0]))
    full = n_slots // group * (group // PAGE_SLOTS)
    return [pair] * full + [("f16", "f16")] * (-(-n_slots // PAGE_SLOTS) - full)


def _decoded(x: npt.NDArray[np.float16], pages: list[str]) -> npt.NDArray[Any]:
    """Keys or values as attention should see them, given the formats of their pages."""
    out = x.astype(np.float32)
    stored = PAGE_SLOTS * sum(row != "f16" for row in pages)
    if stored:
        out[:stored] = rows.decode_rows(pages[0], rows.encode_rows(pages[0], out[:stored]), plain=True)
    return out
