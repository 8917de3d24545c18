"""What the commands need of kvlocal, imported when it is called: `--help` stays fast, and tests replace these."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kvlocal.bench import BenchConfig, Step
    from kvlocal.chat import Chat
    from kvlocal.engine import Engine
    from kvlocal.sampling import Sampling

    from .options import SamplingSettings, Settings
    from .render import Screen


def versions() -> tuple[str, dict[str, Any]]:
    """The version of the package, and what its native libraries were built from."""
    from kvlocal import __version__
    from kvlocal.native import build_info

    return __version__, build_info()


def open_engine(settings: Settings, screen: Screen) -> Engine:
    """Load the model and make its cache, showing a download and the loading on `screen`."""
    from kvlocal.budget import Budget
    from kvlocal.engine import Engine, EngineConfig
    from kvlocal.models import resolve_model
    from kvlocal.policies import make_policy

    # First what can be wrong on the command line: nobody should wait for a download to learn of a typing error.
    policy = make_policy(settings.policy, dict(settings.policy_args))
    budget = Budget.parse(settings.budget)
    with screen.download() as on_progress:
        model = resolve_model(settings.model, progress=on_progress)
    with screen.status(f"Loading {model.name}"):
        return Engine(
            EngineConfig(
                model=model,
                policy=policy,
                budget=budget,
                n_ctx=settings.n_ctx,
                n_batch=settings.n_batch,
                n_ubatch=settings.n_ubatch,
                n_threads=settings.n_threads,
                n_gpu_layers=settings.n_gpu_layers,
                prefill=settings.prefill,
                chunk=settings.chunk,
                guide=settings.guide,
                evict_every=settings.evict_every,
            )
        )


def new_chat(engine: Engine, system: str | None) -> Chat:
    """An empty conversation on `engine`."""
    from kvlocal.chat import Chat

    return Chat(engine, system)


def new_sampling(sampling: SamplingSettings) -> Sampling:
    """The settings of the command line as the engine takes them."""
    from kvlocal.sampling import Sampling

    return Sampling(**asdict(sampling))


def describe_policies() -> Sequence[Any]:
    """One row per policy: `name`, `summary`, `parameters`, `paper`."""
    from kvlocal.policies import describe

    return describe()


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
) -> BenchConfig:
    """What to measure; everything that can be wrong on the command line is found here, before a model is loaded."""
    from kvlocal.bench import BenchConfig
    from kvlocal.sweep import expand

    return BenchConfig(
        variants=expand(policies, settings.policy_args, budgets, storages, prefills),
        depths=tuple(depths),
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=repetitions,
        chunk=chunk,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
    )


def find_model(settings: Settings, random: str | None, screen: Screen) -> Path:
    """The file to measure, fetched or written first if need be."""
    from kvlocal.models import resolve_model

    if random is not None:
        from kvlocal.random_model import random_model

        with screen.status(f"Writing random weights: {random}"):
            return random_model(random)
    with screen.download() as on_progress:
        return resolve_model(settings.model, progress=on_progress)


def describe_machine(n_threads: int) -> dict[str, Any]:
    """Processor, cores, threads and measured memory bandwidth."""
    from kvlocal.machine import describe_machine

    return asdict(describe_machine(n_threads))


def run_bench(
    path: Path, config: BenchConfig, n_gpu_layers: int, on_step: Callable[[Step], None]
) -> Iterator[dict[str, Any]]:
    """The results as they come."""
    from kvlocal.bench import bench
    from kvlocal.model import Model

    model = Model(path, n_gpu_layers=n_gpu_layers)
    try:
        for result in bench(model, config, on_step):
            yield asdict(result)
    finally:
        model.close()


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written after a long run."""
    from kvlocal.plot import check_plot

    check_plot(path)


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the results over depth."""
    from kvlocal.plot import write_plot

    write_plot(rows, path)
