"""Many documents on one model: several sequences decoded together, what they begin with read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvlocal.batch.documents import Document, Documents
from kvlocal.batch.prompt import Frame, Prompt
from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine
from kvlocal.engine.scheduler import Job, Scheduler
from kvlocal.engine.session import prefill_cached
from kvlocal.engine.stepper import Plain
from kvlocal.errors import KVError, UsageError
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampling
from kvlocal.storage.budget import Budget

PREFIX = 0
"""The sequence that holds what all documents begin with."""

_ROUND = 256  # tokens that contexts are a multiple of


@dataclass
class Result:
    """What became of a document; the line that is written for it.

    Attributes:
        finish_reason: ``stop`` (the model ended) or ``length``; ``None`` with an error.
        tokens: ``prompt`` (with what is common), ``generated``.
        kv: at its end ``held_mean`` tokens per layer and head, ``used_bytes``, ``full_bytes`` of a full f16 cache,
            ``archive_bytes`` on disk; and how it was read, ``prefill``.
        timing: ``prefill_s``, ``evict_s``, ``decode_s`` (with the others that were decoded together), ``total_s``.
        error: one sentence, or ``None``.
    """

    id: str
    source: str
    text: str = ""
    finish_reason: str | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    kv: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Step:
    """How far a batch is, after something was done.

    Attributes:
        prompt: tokens of prompts that were read; generated: of answers.
        used_bytes: K and V of all sequences; peak_bytes: the most ever taken.
    """

    done: int
    failed: int
    running: int
    prompt: int
    generated: int
    used_bytes: int
    peak_bytes: int


def batch_config(
    config: EngineConfig,
    model: Model,
    prompt: Prompt,
    documents: Documents | Sequence[Document],
    n_predict: int,
    parallel: int,
) -> EngineConfig:
    """The settings of an engine for ``parallel`` documents at a time.

    A budget in bytes is for all of them together. Without a given size the context is what the longest document needs,
    or the most that the model was trained for.
    """
    frame = prompt.frame(model)
    prefix = frame.before
    n_ctx = config.n_ctx
    if not n_ctx:
        found = documents if isinstance(documents, Documents) else Documents.of(documents)
        longest = _longest(model, prompt, found, frame)
        needed = len(prefix) + longest + (n_predict if n_predict >= 0 else 1024) + 1
        n_ctx = min(-(-needed // _ROUND) * _ROUND, model.n_ctx_train)
    budget = config.budget
    if budget.unit == "bytes":
        budget = Budget("bytes", int(budget.value) // parallel)
    return replace(config, n_ctx=n_ctx, budget=budget, n_seq_max=parallel + 1, n_pool=parallel * n_ctx + len(prefix))


def _longest(model: Model, prompt: Prompt, documents: Documents, frame: Frame) -> int:
    """Tokens of the longest document; or of the first one found that is longer than the model was trained for.

    A token stands for at least a byte, so documents with fewer bytes than a longer one has tokens are not read.
    """
    longest = 0
    extra = sum(len(text.encode()) for text, _ in frame.after) + 16  # what stands around a text
    for n_bytes, read in documents.largest_first():
        if n_bytes + extra <= longest or longest >= model.n_ctx_train:
            break
        document = read()
        if document.fault is None:
            longest = max(longest, len(prompt.tokens(model, document, frame)))
    return longest


class Batch:
    """Works through documents with an engine whose sequences from 1 on are free for them.

    All that are being answered are decoded together, a token each: the weights are read once for all of them. In
    between a document is read piece by piece, as soon as a sequence is free.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        n_predict: int,
        sampling: Sampling,
        prompt_cache: Path | None = None,
        on_unsaved: Callable[[KVError], None] | None = None,
    ) -> None:
        """``n_predict`` < 0: until the model ends or the context is full. ``prompt_cache``: a file for what documents
        have in common, and ``on_unsaved``; see :func:`kvlocal.engine.session.prefill_cached`."""
        if engine.config.n_seq_max < 2:
            raise UsageError(f"A batch needs at least 2 sequences, the engine has {engine.config.n_seq_max}.")
        self.engine = engine
        self.prompt = prompt
        self.n_predict = n_predict
        self.sampling = sampling
        self._frame = prompt.frame(engine.model)
        self._prefix = self._frame.before
        self._done = self._failed = self._read = self._generated = 0
        self._scheduler = Scheduler(engine.model, engine.reader, engine.evictor, engine.sequences[:PREFIX:-1])
        if self._prefix:
            found = 0
            if prompt_cache is None:
                engine.prefill(self._prefix, mode="whole")
            else:
                found = prefill_cached(prompt_cache, engine, self._prefix, mode="whole", on_unsaved=on_unsaved)
            self._read = len(self._prefix) - found
            self._scheduler.prefix = engine.sequences[PREFIX]

    @property
    def note(self) -> str | None:
        """What the user should know of how the chat template takes the messages."""
        return self._frame.note

    def run(self, documents: Iterable[Document], on_step: Callable[[Step], None] | None = None) -> Iterator[Result]:
        """The results, each as soon as it is there; a document that fails becomes one with an ``error``."""
        scheduler = self._scheduler
        waiting = iter(documents)
        works: dict[Job, Document] = {}
        try:
            while True:
                while len(works) < self.engine.config.n_seq_max - 1 and (document := next(waiting, None)) is not None:
                    job = self._job(document)
                    if job is None:
                        self._done, self._failed = self._done + 1, self._failed + 1
                        yield Result(document.id, document.source, error=document.fault)
                        self._tell(on_step, len(works))
                    else:
                        works[job] = document
                        scheduler.add(job)
                if not works:
                    return
                before = sum(job.n_generated for job in works)
                over = scheduler.step()
                self._generated += sum(job.n_generated for job in works) - before
                self._tell(on_step, len(works))
                for job in over:
                    result = self._result(job, works.pop(job))
                    scheduler.retire(job)
                    yield result
                    self._tell(on_step, len(works))
        finally:
            for job in works:
                scheduler.retire(job)

    def _job(self, document: Document) -> Job | None:
        """What a document asks for; ``None`` of one without a text."""
        if document.fault is not None:
            return None
        model = self.engine.model
        tokens = self.prompt.tokens(model, document, self._frame)
        stepper = Plain(self.sampling, model.n_vocab, model.end_tokens if self.sampling.ignore_eos else ())
        return Job(tokens, stepper, self.n_predict, on_read=self._note_read())

    def _note_read(self) -> Callable[[int, int], None]:
        """Counts what is read of one document."""
        last = 0

        def on_read(done: int, _total: int) -> None:
            nonlocal last
            self._read += max(done - last, 0)
            last = max(done, last)

        return on_read

    def _result(self, job: Job, document: Document) -> Result:
        result = Result(document.id, document.source, job.text, job.finish_reason)
        self._done += 1
        if job.error is not None:
            self._failed += 1
            result.error = str(job.error)
        if job.n_read:
            result.tokens = {"prompt": len(self._prefix) + job.n_prompt, "generated": job.n_generated}
            result.kv = {"prefill": job.used_mode}
            result.timing = {"evict_s": job.evict_s, "prefill_s": job.read_s}
        if job.error is None and job.sequence is not None:
            result.kv |= self.engine.kv(job.sequence)
            result.timing["decode_s"] = job.ended - job.first
            result.timing["total_s"] = job.ended - job.began
        return result

    def _tell(self, on_step: Callable[[Step], None] | None, n_running: int) -> None:
        if on_step is not None:
            stats = self.engine.context.stats()
            on_step(
                Step(
                    done=self._done,
                    failed=self._failed,
                    running=n_running,
                    prompt=self._read,
                    generated=self._generated,
                    used_bytes=int(stats.used_bytes),
                    peak_bytes=int(stats.peak_bytes),
                )
            )
