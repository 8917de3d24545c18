"""What the commands need of kvlocal, imported when it is called: `--help` stays fast, and tests replace these."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvlocal.errors import UsageError
from kvlocal_cli.backend.loading import load_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvlocal.engine.chat import Chat
    from kvlocal.engine.config import EngineConfig
    from kvlocal.engine.engine import Engine
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.options.settings import SamplingSettings, Settings
    from kvlocal_cli.render.screen import Screen


def versions() -> tuple[str, dict[str, Any]]:
    """The version of the package, and what its native libraries were built from."""
    from kvlocal import __version__
    from kvlocal.native.library import build_info

    return __version__, build_info()


def engine_config(settings: Settings, screen: Screen, n_seq_max: int = 1) -> EngineConfig:
    """The settings as the engine takes them; the model is fetched if need be, its download shown on `screen`."""
    from kvlocal.engine.config import EngineConfig
    from kvlocal.models.resolve import resolve_model
    from kvlocal.policies import make_policy
    from kvlocal.retrieval import make_retriever
    from kvlocal.storage.archive import Archive
    from kvlocal.storage.budget import Budget
    from kvlocal.storage.storage import Storage

    # First what can be wrong on the command line: nobody should wait for a download to learn of a typing error.
    policy = make_policy(settings.policy, dict(settings.policy_args), here=settings.policy_typed)
    budget = Budget.parse(settings.budget)
    read = {"budget": settings.retrieve_budget, **settings.retrieve_args}
    retrieve = settings.retrieve or policy.reads
    if settings.retrieve_args and not retrieve:
        raise UsageError(f"Policy {policy.name} reads all that it keeps; --retrieve-arg needs --retrieve NAME.")
    retriever = make_retriever(retrieve, read) if retrieve else None
    archive = Archive.parse(
        settings.archive,
        storage=settings.archive_format,
        recall=settings.recall,
        budget=settings.recall_budget,
        by_step=retriever is not None,
    )
    with screen.download() as on_progress:
        model = resolve_model(settings.model, progress=on_progress)
    return EngineConfig(
        model=model,
        policy=policy,
        budget=budget,
        retriever=retriever,
        archive=archive,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_batch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        n_gpu_layers=settings.n_gpu_layers,
        kv_swa=settings.kv_swa,
        kernels=settings.kernels,
        prefill=settings.prefill,
        chunk=settings.chunk,
        guide=settings.guide,
        storage=Storage.parse(settings.storage, tail=settings.storage_tail),
        evict_every=settings.evict_every,
        n_seq_max=n_seq_max,
    )


def open_engine(settings: Settings, screen: Screen) -> Engine:
    """Load the model and make its cache, showing a download and the loading on `screen`."""
    config = engine_config(settings, screen)
    with screen.status(f"Loading {config.model.name}"):
        return load_engine(config, screen)


def plan_run(
    settings: Settings, *, n_prompt: int, n_generate: int | None, parallel: int, memory: int | None, screen: Screen
) -> dict[str, Any]:
    """What a run will take (a `Plan`); `memory`: bytes to plan for, None for what this machine has free."""
    from kvlocal.measure.plan import Planner

    config = engine_config(settings, screen, parallel)
    with (
        screen.status(f"Planning with {config.model.name}"),
        Planner(config.model, n_gpu_layers=config.n_gpu_layers, free_bytes=memory) as planner,
    ):
        return planner.plan(config, n_prompt, -1 if n_generate is None else n_generate).as_dict()


def new_chat(engine: Engine, system: str | None) -> Chat:
    """An empty conversation on `engine`."""
    from kvlocal.engine.chat import Chat

    return Chat(engine, system)


def change_policy(engine: Engine, name: str, pairs: Sequence[str]) -> bool:
    """Another policy from now on, as it was typed, with `name=value` pairs; True if the cache was made anew."""
    from kvlocal.policies import make_policy
    from kvlocal_cli.options.settings import parse_policy_args

    args = parse_policy_args(tuple(pairs), sink=None, window=None)
    return engine.change(policy=make_policy(name, args, here=True))


def change_budget(engine: Engine, text: str) -> bool:
    """Another budget from now on; True if the cache was made anew."""
    from kvlocal.storage.budget import Budget

    return engine.change(budget=Budget.parse(text))


def new_sampling(sampling: SamplingSettings) -> Sampling:
    """The settings of the command line as the engine takes them."""
    from kvlocal.native.sampling import Sampling

    return Sampling(**asdict(sampling))


def describe_policies() -> Sequence[Any]:
    """One row per policy: `name`, `summary`, `parameters`, `paper`."""
    from kvlocal.policies import describe

    return describe()
