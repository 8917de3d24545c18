"""How far a mean over cases would have moved with other cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvlocal.errors import UsageError

_BLOCK = 1 << 22  # most values drawn at once, 32 MiB


def interval(
    values: Sequence[float] | npt.NDArray[np.floating],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Paper: Efron, *Bootstrap Methods: Another Look at the Jackknife*, Annals of Statistics 7(1), 1979.

    Formula: ``n_resamples`` times, the mean of ``n`` draws with replacement from the ``n`` values; the interval runs
    from the ``(1 - level) / 2`` to the ``(1 + level) / 2`` quantile of these means.

    Shapes: ``values [n]``. Cost: ``n_resamples * n``. For few values (below some 20) it is too narrow, and if all are
    equal it has no width at all: more cases, not more resamples, help. One value: it twice. None: NaN twice.

    Raises:
        UsageError: ``level`` not between 0 and 1, ``n_resamples`` below 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"level is {level:g}; give a number between 0 and 1.")
    if n_resamples < 1:
        raise UsageError(f"n_resamples is {n_resamples}; give a whole number of at least 1.")
    data = np.asarray(values, np.float64).ravel()
    n = len(data)
    if n < 2:
        value = float(data[0]) if n else float("nan")
        return value, value
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // n)
    sizes = [min(step, n_resamples - start) for start in range(0, n_resamples, step)]
    means = np.concatenate([data[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
