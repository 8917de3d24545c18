"""Types of the fixtures, and random text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvlocal.native.context import Context
from kvlocal.native.model import Model

OpenModel = Callable[..., Model]
OpenContext = Callable[..., Context]


def random_tokens(model: Model, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, model.n_vocab, n).astype(np.int32)
