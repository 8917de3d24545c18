"""Many sequences on one context: those that answer go on together, prompts are read in between, a piece a step."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal

from kvlocal.engine.evictor import Evictor
from kvlocal.engine.reading import Mode, Reader
from kvlocal.engine.sequence import Sequence, append
from kvlocal.engine.stepper import Stepper
from kvlocal.errors import KVError
from kvlocal.native.model import Model

Finish = Literal["stop", "length"]


@dataclass(eq=False)
class Job:
    """A prompt that is to be read and the answer to it.

    Attributes:
        prompt: tokens that follow what its sequence holds; empty: the answer begins at once.
        stepper: how the answer goes on, ``None``: there is none, the prompt is read.
        n_predict: most tokens of the answer; below 0: until it ends or the context is full.
        mode: how the prompt is read; ``None``: as the settings say, whole where it fits.
        sequence: where; ``None``: one of the scheduler's, when one is free.
        on_read: called with tokens of the prompt read and in all.
        text: the answer so far; :meth:`take` gives what is new in it. n_read, n_generated: tokens so far; n_prompt: of
            the prompt as it was given: a job that had to make room reads its answer again as well.
        finish_reason: ``stop`` (the model ended) or ``length``; error: what ended it instead.
        read_s: seconds of reading without evictions; evict_s: of its evictions.
        began, first, ended: when it was begun, its first token was known, and it was over (``time.perf_counter``).
    """

    prompt: list[int]
    stepper: Stepper | None
    n_predict: int = -1
    mode: Mode | None = None
    sequence: Sequence | None = None
    on_read: Callable[[int, int], None] | None = None
    text: str = ""
    n_prompt: int = 0
    n_read: int = 0
    n_generated: int = 0
    finish_reason: Finish | None = None
    error: KVError | None = None
    read_s: float = 0.0
    evict_s: float = 0.0
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    used_mode: Mode | None = None
    reading: Generator[int] | None = field(default=None, repr=False)
    next: list[int] = field(default_factory=list)
    _taken: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False
    )

    @property
    def over(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    def take(self) -> str:
        """What has been added to the text since the last call."""
        piece, self._taken = self.text[self._taken :], len(self.text)
        return piece

    def say(self, data: bytes) -> None:
        """Add what a token stands for; half a character waits for its rest, and is left out if that never comes."""
        self.text += self._decoder.decode(data)


class Scheduler:
    """Lets many jobs share one context. :meth:`step` decodes the next tokens of all that answer, in one batch, and then
    one piece of the prompt of the job that came first: nobody waits longer than a piece.

    Jobs without a sequence wait until one of ``free`` is. With a ``prefix``, theirs begins as a copy of it.
    """

    def __init__(self, model: Model, reader: Reader, evictor: Evictor, free: list[Sequence] | None = None) -> None:
        self._model = model
        self._reader = reader
        self._evictor = evictor
        self.prefix: Sequence | None = None
        self.free = list(free or ())
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._full = False  # a job had to make room: none is begun before another is over

    def add(self, job: Job) -> None:
        job.n_prompt = len(job.prompt)
        self.waiting.append(job)

    def step(self) -> list[Job]:
        """Go on by one token of every answer and one piece of a prompt; returns the jobs that are over now.

        A job that fails is over with its ``error``; the others go on.
        """
        self._admit()
        self._decode([job for job in self.running if not job.over and job.reading is None])
        reading = next((job for job in self.running if job.reading is not None and not job.over), None)
        if reading is not None:
            self._read(reading)
        over = [job for job in self.running if job.over]
        for job in over:
            self.abandon(job)
        return over

    def retire(self, job: Job) -> None:
        """Give a job's sequence back, whether it is over or not."""
        self.abandon(job)
        if job.sequence is not None:
            job.sequence.release()
            self.free.append(job.sequence)
            job.sequence = None

    def abandon(self, job: Job) -> None:
        """Let a job go: a prompt that is not read to its end is taken back. Its sequence stays as it is."""
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.running:
            self.running.remove(job)
            self._full = False
        if job.reading is not None:
            job.reading.close()
            job.reading = None
        if job.stepper is not None:
            job.stepper.close()
        job.ended = job.ended or time.perf_counter()

    #
    # admit, read
    #

    def _admit(self) -> None:
        while self.waiting and (self.waiting[0].sequence is not None or self.free):
            if self._full and self.running:
                return
            job = self.waiting.popleft()
            self.running.append(job)
            if job.sequence is None:
                job.sequence = self.free.pop()
                if self.prefix is not None:
                    self.prefix.branch(job.sequence)
            job.began = job.began or time.perf_counter()
            if job.prompt:
                mode = job.mode
                if mode is None:
                    whole = not self._reader.chunks() and self._reader.fits(len(job.prompt), job.sequence)
                    mode = "exact" if whole else "chunked"
                job.used_mode = mode
                job.reading = self._reader.read(job.sequence, job.prompt, mode)
            else:
                self._choose(job)

    def _read(self, job: Job) -> None:
        """One piece of a prompt; after the last one the answer begins."""
        assert job.reading is not None
        start, evict_s = time.perf_counter(), self._evictor.evict_s
        try:
            done = next(job.reading, None)
            if done == len(job.prompt):
                next(job.reading, None)  # it has ended: nothing is taken back any more
        except KVError as error:
            job.error, job.reading = error, None
            return
        evicting = self._evictor.evict_s - evict_s
        job.evict_s += evicting
        job.read_s += time.perf_counter() - start - evicting
        job.n_read = done or 0
        if job.on_read is not None:
            job.on_read(job.n_read, len(job.prompt))
        if done == len(job.prompt):
            job.reading = None
            self._choose(job)

    #
    # answer
    #

    def _decode(self, jobs: list[Job]) -> None:
        """The tokens that were chosen of all of them, in one batch."""
        parts = {job.sequence: job.next for job in jobs if job.sequence is not None}
        if not parts:
            return
        before = [len(sequence.tokens) for sequence in parts]
        try:
            append(parts)
        except KVError as error:
            if len(jobs) > 1:
                self._preempt(jobs[-1])  # room for the others
            else:
                jobs[0].error = error
            return
        finally:
            # what is in the cache was said, after an interruption too
            for job, sequence, n in zip(jobs, parts, before, strict=True):
                said = sequence.tokens[n:]
                job.n_generated += len(said)
                for token in said:
                    job.say(self._model.piece(token))
        for job in jobs:
            self._choose(job)
        for job in jobs:
            assert job.sequence is not None
            evict_s = self._evictor.evict_s
            try:
                self._evictor.after(job.sequence, "step")
            except KVError as error:  # the step was computed and is in the cache
                job.error, job.finish_reason = error, None
            job.evict_s += self._evictor.evict_s - evict_s

    def _choose(self, job: Job) -> None:
        """The next tokens of an answer, or why there are none."""
        assert job.sequence is not None
        if job.stepper is None or 0 <= job.n_predict <= job.n_generated:
            job.finish_reason = "length"
            return
        if len(job.sequence.tokens) >= self._reader.n_max:
            job.finish_reason = "length"
            return
        tokens = job.stepper.next(job.sequence)
        job.first = job.first or time.perf_counter()
        end = next((i for i, token in enumerate(tokens) if self._model.is_end(token)), None)
        if end == 0:
            job.finish_reason = "stop"
        job.next = tokens if end is None else tokens[:end]

    def _preempt(self, job: Job) -> None:
        """Give a job's sequence back; what was read and said is read again when there is room."""
        assert job.sequence is not None
        n_prefix = len(self.prefix.tokens) if self.prefix is not None else 0
        job.prompt = job.sequence.tokens[n_prefix:]
        self.running.remove(job)
        job.sequence.release()
        self.free.append(job.sequence)
        job.sequence = None
        self.waiting.appendleft(job)
        self._full = True
