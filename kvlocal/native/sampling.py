"""Choosing the next token, through llama.cpp's own samplers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvlocal import settings
from kvlocal.native import library

LEAST_TEMP = 1e-4
"""Below this the likeliest token is taken: logits divided by less may exceed what a float holds."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names and defaults are llama.cpp's, the ranges those of
    :mod:`kvlocal.settings`.

    Attributes:
        temp: temperature; 0 takes the most likely token.
        top_k: only the k most likely (0: all).
        top_p: only the most likely whose probabilities sum to p (1: all).
        min_p: only those at least this likely relative to the best (0: all).
        repeat_penalty: divides the logits of the last 64 tokens (1: off).
        seed: of the random generator (-1: a random one).
        ignore_eos: never end the text, go on to the limit.

    Raises:
        UsageError: a value of another type, or out of range.
    """

    temp: float = settings.TEMP.default
    top_k: int = settings.TOP_K.default
    top_p: float = settings.TOP_P.default
    min_p: float = settings.MIN_P.default
    repeat_penalty: float = settings.REPEAT_PENALTY.default
    seed: int = settings.SEED.default
    ignore_eos: bool = settings.IGNORE_EOS.default

    def __post_init__(self) -> None:
        for setting in settings.SETTINGS:
            if setting.taker == "sampling":
                object.__setattr__(self, setting.name, setting.check(getattr(self, setting.name)))


class Sampler:
    """A chain of llama.cpp samplers; :meth:`sample` takes from the last output of a context.

    ``ends``: the tokens that end a text, which ``ignore_eos`` forbids.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, ends: Sequence[int] = ()) -> None:
        self._llama = library.load().llama
        self._chain: Any = self._llama.llama_sampler_chain_init(self._llama.llama_sampler_chain_default_params())
        if sampling.ignore_eos and ends:
            bias = (self._llama.llama_logit_bias * len(ends))(*((token, -math.inf) for token in ends))
            self._add("logit_bias", n_vocab, len(ends), bias)
        if sampling.repeat_penalty != 1:
            self._add("penalties", n_vocab, 64, sampling.repeat_penalty, 0.0, 0.0)
        if sampling.temp < LEAST_TEMP:
            self._add("greedy")
            return
        if sampling.top_k > 0:
            self._add("top_k", sampling.top_k)
        if sampling.top_p < 1:
            self._add("top_p", sampling.top_p, 1)
        if sampling.min_p > 0:
            self._add("min_p", sampling.min_p, 1)
        self._add("temp", sampling.temp)
        self._add("dist", sampling.seed & 0xFFFFFFFF)

    def _add(self, name: str, *arguments: Any) -> None:
        init = getattr(self._llama, f"llama_sampler_init_{name}")
        self._llama.llama_sampler_chain_add(self._chain, init(*arguments))

    def sample(self, ctx: Any, output: int = -1) -> int:
        """The next token after the token ``output`` of the last batch of ``ctx`` (-1: after its last output)."""
        return int(self._llama.llama_sampler_sample(self._chain, ctx, output))

    def sample_from(self, logits: np.ndarray) -> int:
        """The next token after logits float32 ``[n_vocab]`` that were kept."""
        candidates = np.zeros(len(logits), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        pointer = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._llama.llama_token_data))
        array = self._llama.llama_token_data_array(data=pointer, size=len(logits), selected=-1, sorted=False)
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        self._llama.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        if self._chain is not None:
            self._llama.llama_sampler_free(self._chain)
            self._chain = None
