"""What `kvlocal batch` needs of kvlocal, imported when it is called; see :mod:`kvlocal_cli.backend.engine`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvlocal_cli.backend.engine import engine_config
from kvlocal_cli.backend.loading import load_engine
from kvlocal_cli.terminal.prompt import file_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvlocal.batch.batch import Batch
    from kvlocal.batch.documents import Documents
    from kvlocal.batch.results import Results
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.options.settings import Settings
    from kvlocal_cli.render.screen import Screen


STDOUT = "-"
"""The output that is standard output."""


def read_documents(inputs: Sequence[str], output: str, *, text: str, id: str, question: str) -> Documents:
    """The documents of a batch, not its `output`; `text`, `id` and `question` name fields of .jsonl files."""
    from pathlib import Path

    from kvlocal.batch.documents import Fields, read_documents

    return read_documents(inputs, Fields(text, id, question), None if output == STDOUT else Path(output))


def open_results(output: str, resume: bool, settings: Mapping[str, str | int | bool]) -> Results:
    """Where the results of a batch go, with the settings that they depend on."""
    from pathlib import Path

    from kvlocal.batch.results import Results

    return Results(None if output == STDOUT else Path(output), resume=resume, settings=settings)


def result_settings(
    settings: Settings, sampling: Sampling, parallel: int, **task: str | int | bool
) -> dict[str, str | int | bool]:
    """What the results of a batch depend on; `task`: what is asked. Settings of speed alone are not among them."""
    from dataclasses import asdict, fields, is_dataclass

    from kvlocal.measure.code import policy_digest
    from kvlocal.models.identity import model_identity
    from kvlocal.policies import make_policy
    from kvlocal.storage.budget import Budget
    from kvlocal.storage.storage import Storage

    policy = make_policy(settings.policy, dict(settings.policy_args), here=settings.policy_typed)
    budget = Budget.parse(settings.budget)
    args: dict[str, Any] = asdict(policy) if is_dataclass(policy) else {}
    defaults: dict[str, Any] = {field.name: field.default for field in fields(policy)} if is_dataclass(policy) else {}
    storage = Storage.parse(settings.storage, tail=settings.storage_tail)
    code = policy_digest(policy)
    return {
        "model": model_identity(settings.model),
        **task,
        "policy": settings.policy,
        "policy_args": _listed({name: value for name, value in args.items() if value != defaults[name]}),
        **({"policy_code": code} if code else {}),
        "budget": str(budget),
        **({"parallel": parallel} if budget.unit == "bytes" else {}),
        "kv": settings.storage if storage == Storage.parse(settings.storage) else f"{settings.storage}, {storage}",
        "n_ctx": settings.n_ctx,
        "prefill": settings.prefill,
        "chunk": settings.chunk,
        "guide": settings.guide,
        "evict_every": settings.evict_every,
        "sampling": _listed(asdict(sampling)),
    }


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


@contextmanager
def open_batch(
    settings: Settings,
    documents: Documents,
    system: str | None,
    instruction: str,
    raw: bool,
    n_predict: int,
    sampling: Sampling,
    parallel: int,
    prompt_cache: str | None,
    screen: Screen,
) -> Iterator[Batch]:
    """An engine for as many documents at a time, and what works through them."""
    from kvlocal.batch.batch import Batch, batch_config
    from kvlocal.batch.prompt import Prompt
    from kvlocal.native.model import Model

    config = engine_config(settings, screen)
    prompt = Prompt(system, instruction, raw)
    with screen.status(f"Loading {config.model.name}"):
        model = Model(config.model, n_gpu_layers=config.n_gpu_layers)
        try:
            config = batch_config(config, model, prompt, documents, n_predict, parallel)
        except BaseException:
            model.close()
            raise
        engine = load_engine(config, screen, model)
    with engine:
        cache = None if prompt_cache is None else file_path(prompt_cache)
        work = Batch(engine, prompt, n_predict, sampling, cache, screen.unsaved)
        screen.note(work.note)
        yield work
