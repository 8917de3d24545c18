"""What `kvlocal bench` needs of kvlocal, imported when it is called; see :mod:`kvlocal_cli.backend.engine`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kvlocal.measure.bench_config import BenchConfig, Step
    from kvlocal_cli.options.settings import Settings


def plan_bench(
    settings: Settings,
    *,
    policies: Sequence[str],
    budgets: Sequence[str],
    storages: Sequence[str],
    prefills: Sequence[Any],
    depths: Sequence[int],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    chunk: int,
    retrieves: Sequence[str],
    retrieve_budgets: Sequence[int],
) -> BenchConfig:
    """What to measure; everything that can be wrong on the command line is found here, before a model is loaded."""
    from kvlocal.measure.bench_config import BenchConfig
    from kvlocal.measure.variants import expand, retrievers

    return BenchConfig(
        variants=expand(
            policies,
            settings.policy_args,
            budgets,
            storages,
            prefills,
            here=settings.policy_typed,
            retrievers=retrievers(retrieves, settings.retrieve_args, retrieve_budgets),
        ),
        depths=tuple(depths),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=repetitions,
        chunk=chunk,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        kernels=settings.kernels,
        evict_every=settings.evict_every,
    )


def run_bench(
    path: Path, config: BenchConfig, n_gpu_layers: int, on_step: Callable[[Step], None]
) -> Iterator[dict[str, Any]]:
    """The results as they come."""
    from kvlocal.measure.bench import bench
    from kvlocal.native.model import Model

    model = Model(path, n_gpu_layers=n_gpu_layers)
    try:
        for result in bench(model, config, on_step):
            yield asdict(result)
    finally:
        model.close()


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written after a long run."""
    from kvlocal.measure.bench_plot import check_plot

    check_plot(path)


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the results over depth."""
    from kvlocal.measure.bench_plot import write_plot

    write_plot(rows, path)
