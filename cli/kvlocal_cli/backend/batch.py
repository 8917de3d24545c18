"""What `kvlocal batch` needs of kvlocal, imported when it is called; see :mod:`kvlocal_cli.backend.engine`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvlocal_cli.backend.engine import engine_config
from kvlocal_cli.backend.loading import load_engine
from kvlocal_cli.terminal.prompt import file_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvlocal.batch.batch import Batch
    from kvlocal.batch.documents import Document, Results
    from kvlocal.native.sampling import Sampling
    from kvlocal_cli.options.settings import Settings
    from kvlocal_cli.render.screen import Screen


def read_documents(inputs: Sequence[str], output: Path, *, text: str, id: str, question: str) -> list[Document]:
    """The documents of a batch, not its `output`; `text`, `id` and `question` name fields of .jsonl files."""
    from kvlocal.batch.documents import Fields, read_documents

    return read_documents(inputs, Fields(text, id, question), output)


def open_results(path: Path, resume: bool) -> Results:
    """The file that the results of a batch go to."""
    from kvlocal.batch.documents import Results

    return Results(path, resume=resume)


@contextmanager
def open_batch(
    settings: Settings,
    documents: Sequence[Document],
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
        work = Batch(engine, prompt, n_predict, sampling, cache)
        screen.note(work.note)
        yield work
