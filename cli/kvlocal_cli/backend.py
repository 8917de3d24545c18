"""What the commands need of kvlocal, imported when it is called: `--help` stays fast, and tests replace these."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

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
