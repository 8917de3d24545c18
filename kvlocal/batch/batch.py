"""Many documents on one model: several sequences decoded together, what they begin with read once."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvlocal.batch.documents import Document
from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine, Mode
from kvlocal.engine.session import prefill_cached
from kvlocal.errors import EvictionError, KVError, UsageError
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampler, Sampling
from kvlocal.storage.budget import Budget

PREFIX = 0
"""The sequence that holds what all documents begin with."""

_MARK = "\x1fdocument\x1f"
_ROUND = 256  # tokens that contexts are a multiple of


@dataclass(frozen=True)
class Prompt:
    """Where a document stands in a conversation: tokens before and after it, the same for all.

    Attributes:
        raw: the text is continued as it is, without a chat template.
    """

    system: str | None = None
    instruction: str = ""
    raw: bool = False

    def frame(self, model: Model) -> tuple[list[int], str]:
        """Tokens before every document, and the text that follows every document's own."""
        before = f"{self.instruction}\n\n" if self.instruction else ""
        if self.raw:
            return model.tokenize(before) if before else [], ""
        messages = [{"role": "user", "content": f"{before}{_MARK}"}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        text = model.chat_text(messages)
        head, mark, tail = text.partition(_MARK)
        if not mark:
            raise UsageError(f"The chat template of {model.name} leaves out the text; use --no-chat-template.")
        return model.template_tokens(head), tail

    def tokens(self, model: Model, document: Document, tail: str, *, first: bool) -> list[int]:
        """What follows the common tokens; nothing in a document is read as a control token.

        ``first``: there are no common tokens, so that the model's first token is due.
        """
        text = f"{document.text}\n\n{document.question}" if document.question else document.text
        out = model.tokenize(text, add_special=first, parse_special=False)
        return out + (model.tokenize(tail, add_special=False) if tail else [])


@dataclass
class Result:
    """What became of a document; the line that is written for it.

    Attributes:
        finish_reason: ``stop`` (the model ended) or ``length``; ``None`` with an error.
        tokens: ``prompt`` (with what is common), ``generated``.
        kv: at its end ``held_mean`` tokens per layer and head, ``used_bytes``, ``full_bytes`` of a full f16 cache; and
            how it was read, ``prefill``.
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


class _Work:
    """A document that has a sequence of its own."""

    def __init__(self, document: Document, seq: int) -> None:
        self.document = document
        self.seq = seq
        self.result = Result(document.id, document.source)
        self.sampler: Sampler | None = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.token = 0  # the next one
        self.n = 0  # of the answer
        self.start = time.perf_counter()
        self.first = 0.0  # when the first one of the answer was known

    @property
    def over(self) -> bool:
        return self.result.error is not None or self.result.finish_reason is not None


def batch_config(
    config: EngineConfig, model: Model, prompt: Prompt, documents: Sequence[Document], n_predict: int, parallel: int
) -> EngineConfig:
    """The settings of an engine for ``parallel`` documents at a time.

    A budget in bytes is for all of them together. Without a given size the context is what the longest document needs,
    or the most that the model was trained for.
    """
    prefix, tail = prompt.frame(model)
    n_ctx = config.n_ctx
    if not n_ctx:
        longest = max(len(prompt.tokens(model, document, tail, first=not prefix)) for document in documents)
        needed = len(prefix) + longest + (n_predict if n_predict >= 0 else 1024) + 1
        n_ctx = min(-(-needed // _ROUND) * _ROUND, model.n_ctx_train)
    budget = config.budget
    if budget.unit == "bytes":
        budget = Budget("bytes", int(budget.value) // parallel)
    return replace(config, n_ctx=n_ctx, budget=budget, n_seq_max=parallel + 1, n_pool=parallel * n_ctx + len(prefix))


class Batch:
    """Works through documents with an engine whose sequences from 1 on are free for them.

    A document is read as soon as a sequence is free. In between, all that are being answered are decoded together, a
    token each: the weights are read once for all of them.
    """

    def __init__(
        self, engine: Engine, prompt: Prompt, n_predict: int, sampling: Sampling, prompt_cache: Path | None = None
    ) -> None:
        """``n_predict`` < 0: until the model ends or the context is full. ``prompt_cache``: a file for what documents
        have in common; see :func:`kvlocal.engine.session.prefill_cached`."""
        if engine.config.n_seq_max < 2:
            raise UsageError(f"A batch needs at least 2 sequences, the engine has {engine.config.n_seq_max}.")
        self.engine = engine
        self.prompt = prompt
        self.n_predict = n_predict
        self.sampling = sampling
        self._prefix, self._tail = prompt.frame(engine.model)
        self._done = self._failed = self._read = self._generated = 0
        self._on_step: Callable[[Step], None] | None = None
        if self._prefix:
            found = 0
            if prompt_cache is None:
                engine.prefill(self._prefix, seq=PREFIX, mode="whole")
            else:
                found = prefill_cached(prompt_cache, engine, self._prefix, mode="whole")
            self._read = len(self._prefix) - found

    def run(self, documents: Iterable[Document], on_step: Callable[[Step], None] | None = None) -> Iterator[Result]:
        """The results, each as soon as it is there; a document that fails becomes one with an ``error``."""
        self._on_step = on_step
        waiting = iter(documents)
        free = list(range(self.engine.config.n_seq_max - 1, PREFIX, -1))
        running: list[_Work] = []
        try:
            while True:
                while free and (document := next(waiting, None)) is not None:
                    running.append(_Work(document, free.pop()))
                    self._begin(running[-1], len(running))
                if not running:
                    return
                for work in [work for work in running if work.over]:
                    running.remove(work)
                    free.append(work.seq)
                    yield self._end(work)
                    self._step(len(running))
                if running:
                    self._decode(running)
        finally:
            for work in running:
                self._close(work)

    def _begin(self, work: _Work, n_running: int) -> None:
        """Reads a document up to the first token of its answer."""
        engine, seq, result = self.engine, work.seq, work.result
        evict_s = engine.keeper.evict_s
        if work.document.fault is not None:
            result.error = work.document.fault
            return
        try:
            tokens = self.prompt.tokens(engine.model, work.document, self._tail, first=not self._prefix)
            engine.branch(PREFIX, seq)
            mode: Mode = "exact" if engine.config.prefill == "exact" and engine.fits(len(tokens), seq) else "chunked"
            engine.prefill(tokens, seq=seq, mode=mode, on_progress=lambda _done, _total: self._step(n_running))
        except KVError as error:
            result.error = str(error)
            return
        self._read += len(tokens)
        work.first = time.perf_counter()
        result.tokens = {"prompt": len(self._prefix) + len(tokens), "generated": 0}
        result.kv = {"prefill": mode}
        result.timing = {"evict_s": engine.keeper.evict_s - evict_s}
        result.timing["prefill_s"] = work.first - work.start - result.timing["evict_s"]
        ends = engine.model.end_tokens if self.sampling.ignore_eos else ()
        work.sampler = Sampler(self.sampling, engine.model.n_vocab, ends)
        self._choose(work, -1)

    def _choose(self, work: _Work, output: int) -> None:
        """The next token of an answer from an output of the last step, or why there is none."""
        assert work.sampler is not None
        if 0 <= self.n_predict <= work.n or len(self.engine.tokens[work.seq]) >= self.engine.n_max:
            work.result.finish_reason = "length"
            return
        work.token = work.sampler.sample(self.engine.context.handle, output)
        if self.engine.model.is_end(work.token):
            work.result.finish_reason = "stop"

    def _decode(self, running: list[_Work]) -> None:
        """One token more for all of them."""
        try:
            self.engine.step({work.seq: work.token for work in running})
        except EvictionError as error:
            next(work for work in running if work.seq == error.seq).result.error = str(error)
        except KVError as error:
            for work in running:
                work.result.error = str(error)
            return
        self._generated += len(running)
        for i, work in enumerate(running):
            if work.over:
                continue
            work.n += 1
            work.result.text += work.decoder.decode(self.engine.model.piece(work.token))
            self._choose(work, i)
        self._step(len(running))

    def _end(self, work: _Work) -> Result:
        result = work.result
        self._done += 1
        self._failed += result.error is not None
        if result.error is None:
            result.text += work.decoder.decode(b"", True)
            result.tokens["generated"] = work.n
            result.kv |= self.engine.kv(work.seq)
            result.timing["decode_s"] = time.perf_counter() - work.first
            result.timing["total_s"] = time.perf_counter() - work.start
        self._close(work)
        return result

    def _close(self, work: _Work) -> None:
        if work.sampler is not None:
            work.sampler.close()
        self.engine.release(work.seq)

    def _step(self, n_running: int) -> None:
        if self._on_step is not None:
            stats = self.engine.context.stats()
            self._on_step(
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
