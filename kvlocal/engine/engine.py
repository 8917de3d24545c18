"""Model, cache and policy together: opens them, reads prompts, generates answers, says what was measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace

import numpy as np
import psutil

from kvlocal.engine.config import EngineConfig, check_chunk, context_config
from kvlocal.engine.evictor import Bounds, Evictor
from kvlocal.engine.hints import beyond_training
from kvlocal.engine.reading import Mode, Reader
from kvlocal.engine.report import KV, Budgeted, Report, Timing, Tokens, peak_rss_bytes
from kvlocal.engine.room import context_tokens
from kvlocal.engine.scheduler import Job, Scheduler
from kvlocal.engine.sequence import Sequence
from kvlocal.engine.stepper import Plain
from kvlocal.errors import KVError
from kvlocal.models.messages import Messages
from kvlocal.models.template import chat_template, chat_tokens
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampling
from kvlocal.policies.parts.policy import Policy
from kvlocal.storage.budget import Budget

Progress = Callable[[int, int], None]


class Engine:
    """One model and its cache. Use as a context manager, or :meth:`close` it.

    Safe to call from several threads: they queue, a generator between any two pieces. Sequence 0 is used where none is
    given.

    Attributes:
        sequences: those of the cache, ``config.n_seq_max``.
        notes: what is worth knowing of the context, sentences.
        lock: hold it to have the engine for more than one call.

    Raises:
        UsageError: the model's architecture or the settings cannot be served.
        KVError: the model cannot be loaded.
    """

    sequences: list[Sequence]
    evictor: Evictor
    reader: Reader

    def __init__(self, config: EngineConfig, model: Model | None = None) -> None:
        """``model``: loaded already; it belongs to the engine then."""
        start = time.perf_counter()
        self.lock = threading.RLock()
        self.closed = False
        self.model = model or Model(config.model, n_gpu_layers=config.n_gpu_layers)
        try:
            self._open(config)
        except BaseException:
            self._unload()
            raise
        self.timing = Timing(load_s=time.perf_counter() - start)
        self.reset()

    def _open(self, config: EngineConfig) -> None:
        self.n_ctx, note = context_tokens(self.model, config)
        self.notes = [text for text in (note, beyond_training(self.n_ctx, self.model.n_ctx_train)) if text]
        if config.prefill == "chunked" and config.policy.evicts and not config.budget.keeps_all:
            check_chunk(config, self.n_ctx)
        self.context = Context(self.model, context_config(self.model, config, self.n_ctx))
        try:
            self._check(config)
        except BaseException:
            self.context.close()
            raise
        self.config = config
        self.evictor = self._make_evictor(config)
        self.reader = Reader(self.context, config, self.evictor, self.n_ctx)
        self.sequences = [Sequence(self.context, seq) for seq in range(config.n_seq_max)]

    def _make_evictor(self, config: EngineConfig) -> Evictor:
        return Evictor(self.context, self._bounds(config))

    def _bounds(self, config: EngineConfig) -> Bounds:
        bounds = (config.policy, config.budget, config.storage, self.n_ctx, config.evict_every)
        return Bounds(*bounds, config.retriever, config.archive)

    def _unload(self) -> None:
        self.model.close()

    def _memory_bytes(self) -> int | None:
        """What a budget must not exceed, ``None``: anything goes."""
        return int(psutil.virtual_memory().total)

    def _check(self, config: EngineConfig) -> None:
        if self.cache is not None:
            config.storage.check(config.budget, self.cache, config.policy, self.n_ctx, self._memory_bytes())

    @property
    def cache(self) -> PagedCache | None:
        """The paged cache, ``None`` over llama.cpp's own."""
        return self.context.cache

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.context.close()
            self._unload()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Have the engine for some calls.

        Raises:
            KVError: it is closed.
        """
        with self.lock:
            if self.closed:
                raise KVError("The model was closed; load it again to go on.")
            yield

    def reset(self) -> None:
        """Forget all sequences and measurements; the model stays loaded."""
        with self.use():
            for sequence in self.sequences:
                sequence.release()
                sequence.owner = None
            self.evictor.reset()
            if self.cache is not None:
                self.cache.reset_peak()
            self.finish_reason: str | None = None
            self._text = ""
            self._n_generated = self._n_prompt = 0
            self._asked: float | None = None  # when the prompt began to be read that the next answer belongs to
            self.timing = Timing(load_s=self.timing.load_s)

    @property
    def model_name(self) -> str:
        return self.model.name

    @property
    def policy(self) -> Policy:
        return self.config.policy

    @property
    def n_max(self) -> int:
        """Most tokens of a sequence."""
        return self.reader.n_max

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokens of plain text: nothing in it becomes a control token."""
        with self.use():
            return self.model.tokenize(text, add_special=add_special)

    def chat_tokens(self, messages: Messages) -> list[int]:
        """Tokens of a conversation; see :func:`kvlocal.models.template.chat_tokens`."""
        with self.use():
            return chat_tokens(self.model, messages)

    def template_note(self, messages: Messages) -> str | None:
        """What the user should know of how the chat template takes the messages."""
        with self.use():
            return chat_template(self.model).note(messages)

    #
    # eviction
    #

    def budget_tokens(self, sequence: Sequence | None = None) -> int:
        """The budget of a sequence now, tokens per head and layer on average."""
        with self.use():
            return self.evictor.budget_tokens(sequence or self.sequences[0])

    def evict(self, sequence: Sequence | None = None) -> bool:
        """Bring a sequence down to its budget; ``False`` if it already holds no more."""
        with self.use():
            return self.evictor.after(sequence or self.sequences[0], "prompt")

    def change(self, *, policy: Policy | None = None, budget: Budget | None = None) -> bool:
        """Another policy or budget from now on: what is held is brought down to it at the next eviction.

        Returns:
            Whether the cache had to be made anew: sequences are empty then, their text must be read again.

        Raises:
            UsageError: they do not fit each other, the model or the context; the settings are as before then.
            KVError: neither the new cache nor one as before can be made; the engine is closed then.
        """
        with self.use():
            old = self.config
            config = replace(old, policy=policy or old.policy, budget=budget or old.budget)
            wanted = context_config(self.model, config, self.n_ctx)
            self._check(config)
            # slots that are renumbered must be f16, and as many in every head
            renumbers = config.policy.rolls and not old.policy.rolls
            if self.context.config.serves(wanted) and not renumbers:
                self.config = self.reader.config = config
                self.evictor.bounds = self._bounds(config)
                for sequence in self.sequences:
                    self.evictor.watch(sequence)
                return False
            self.context.close()
            try:
                self._open(config)
            except BaseException:
                try:
                    self._open(old)
                except BaseException:
                    self.close()
                    raise
                self.reset()
                raise
            self.reset()
            return True

    #
    # read and generate
    #

    def prefill(
        self,
        tokens: list[int],
        *,
        sequence: Sequence | None = None,
        on_progress: Progress | None = None,
        mode: Mode | None = None,
    ) -> None:
        """Append a prompt to a sequence and evict at its end (``exact``) or after every chunk (``chunked``).

        ``mode``: another one than that of the settings. Between two pieces other threads may have the engine.

        Raises:
            UsageError: the prompt is empty or longer than the context; nothing has changed then.
            KVError: the cache is full; the sequence is as before.
        """
        sequence = sequence or self.sequences[0]
        with self.use():
            holder = sequence.holder = object()
            scheduler = Scheduler(self.model, self.reader, self.evictor)
            job = Job(list(tokens), None, mode=mode or self.config.prefill, sequence=sequence)
            if self._asked is None:
                self._asked = time.perf_counter()
            begin = len(sequence.tokens)
            scheduler.add(job)
            if not tokens:
                self.reader.check(0, sequence, begin, chunked=False)
        try:
            while not job.over:
                with self.use():
                    self._hold(sequence, holder)
                    scheduler.step()
                if job.error is None and on_progress:
                    on_progress(job.n_read, len(tokens))
        except BaseException:
            with self.lock:
                if not self.closed and sequence.holder is holder:
                    scheduler.abandon(job)
                    sequence.cut(begin)
            raise
        if job.error is not None:
            raise job.error
        with self.lock:
            self._n_prompt += len(tokens)
            self.timing.prefill_s += job.read_s

    def extend(
        self,
        tokens: list[int],
        *,
        sequence: Sequence | None = None,
        on_progress: Progress | None = None,
        mode: Mode | None = None,
    ) -> bool:
        """Make a sequence end in exactly ``tokens``, reading only what is new; ``mode`` as for :meth:`prefill`.

        Returns:
            Whether it had to be read again from the beginning, because the change lies in what was evicted.
        """
        sequence = sequence or self.sequences[0]
        with self.use():
            new, reread = self.reader.extend(sequence, list(tokens), mode)
            if new or not tokens:
                self.prefill(new, sequence=sequence, on_progress=on_progress, mode=mode)
            return reread

    def generate(self, n_predict: int, sampling: Sampling, *, sequence: Sequence | None = None) -> Generator[str]:
        """The answer to what was prefilled, as text pieces; ``n_predict`` < 0: until it ends or the context is full.

        Afterwards :attr:`finish_reason` is ``stop`` (the model ended), ``length`` or ``interrupted`` (closed early).

        Raises:
            KVError: the engine was closed, or another text was read into the sequence, since the last piece.
        """
        sequence = sequence or self.sequences[0]
        with self.use():
            holder = sequence.holder = object()
            self._text, self.finish_reason = "", "interrupted"
            stepper = Plain(sampling, self.model.n_vocab, self.model.end_tokens if sampling.ignore_eos else ())
            scheduler = Scheduler(self.model, self.reader, self.evictor)
            job = Job([], stepper, n_predict, sequence=sequence)
            scheduler.add(job)
            start, evict_s = time.perf_counter(), self.evictor.evict_s
            asked, self._asked = self._asked or start, None
        try:
            while not job.over:
                with self.use():
                    self._hold(sequence, holder)
                    scheduler.step()
                    if job.first:
                        self.timing.ttft_s = job.first - asked
                    piece = job.take()
                    self._text += piece
                if piece:
                    yield piece
            self.finish_reason = job.finish_reason or "interrupted"
        finally:
            with self.lock:
                rest = job.take()
                if sequence.holder is holder:
                    self._text += rest
                    self._n_generated += job.n_generated
                    self.timing.decode_s += time.perf_counter() - start - (self.evictor.evict_s - evict_s)
                scheduler.abandon(job)
        if job.error is not None:
            raise job.error

    def _hold(self, sequence: Sequence, holder: object) -> None:
        if sequence.holder is not holder:
            raise KVError(
                "This text cannot go on: another one was read into its cache meanwhile. Finish one before the next, or "
                "load the model once for each."
            )

    #
    # measure
    #

    def held(self, sequence: Sequence | None = None) -> list[np.ndarray]:
        """Tokens held per attention layer and KV head, int32 ``[n_head_kv]`` each; empty over the stock cache."""
        with self.use():
            return self.cache.held((sequence or self.sequences[0]).seq) if self.cache is not None else []

    def kv(self, sequence: Sequence | None = None) -> dict[str, float]:
        """What one sequence holds, ``full_bytes``: in a full f16 cache; ``held_mean``: tokens per layer and KV head;
        ``archive_bytes``: on disk."""
        sequence = sequence or self.sequences[0]
        n = len(sequence.tokens)
        with self.use():
            if self.cache is None:
                stats, n_all = self.context.stats(), max(sum(len(each.tokens) for each in self.sequences), 1)
                used, full = int(stats.used_bytes) * n // n_all, int(stats.full_bytes) * n // n_all
                return {"held_mean": n, "used_bytes": used, "full_bytes": full, "archive_bytes": 0}
            held = self.cache.seq_stats(sequence.seq)
            full = int(held.full_bytes) + self.cache.bytes_per_token * sequence.rolled
            counted = {"held_mean": held.n_slots / held.n_heads, "used_bytes": int(held.used_bytes)}
            return counted | {"full_bytes": full, "archive_bytes": int(held.archive_bytes)}

    def report(self, sequence: Sequence | None = None) -> Report:
        """What was measured since the start or the last :meth:`reset`; bytes come from the pools themselves."""
        sequence = sequence or self.sequences[0]
        with self.use():
            stats, cache = self.context.stats(), self.cache
            n_seen, budget = len(sequence.tokens), self.budget_tokens(sequence)
            tokens = Tokens(self._n_prompt, self._n_generated, n_seen, n_seen, n_seen)
            per_token = stats.full_bytes // n_seen if n_seen else 0
            if cache is not None:
                stats.full_bytes += cache.bytes_per_token * sum(each.rolled for each in self.sequences)
                held = cache.seq_stats(sequence.seq)
                tokens.held_mean = held.n_slots / held.n_heads
                tokens.held_min, tokens.held_max = int(held.held_min), int(held.held_max)
                per_token = self.config.storage.bytes_per_token(cache)
            timing, self.evictor.rss.peak_bytes = self.timing, peak_rss_bytes()
            timing.evict_s = self.evictor.evict_s
            timing.prefill_tps = self._n_prompt / timing.prefill_s if timing.prefill_s else 0.0
            timing.decode_tps = self._n_generated / timing.decode_s if timing.decode_s else 0.0
            return Report(
                text=self._text,
                model=self.model_name,
                policy=self.policy.name,
                policy_args=asdict(self.policy) if is_dataclass(self.policy) and fields(self.policy) else {},
                budget=Budgeted(budget, min(budget / n_seen, 1.0) if n_seen else 1.0, budget * per_token),
                tokens=tokens,
                kv=KV(stats.full_bytes, stats.used_bytes, stats.allocated_bytes, stats.peak_bytes, stats.fixed_bytes),
                **self.evictor.reports(sequence),
                rss=self.evictor.rss,
                timing=replace(timing),
                finish_reason=self.finish_reason,
            )
