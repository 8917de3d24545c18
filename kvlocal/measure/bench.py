"""Speed and memory by depth, for any number of policies, storages, budgets and prefill modes, in turns in one process.

Every *variant* has a context of its own over the same weights. They are brought to each depth step by step in turns,
and every round of the measurement gives each of them its turn, so that a machine that gets slower or faster meanwhile
does so for all of them alike. The text is random: deterministic token ids without special and control tokens. What the
tokens are does not matter for speed; which of them a policy then keeps means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import numpy as np
import psutil

from kvlocal.engine.evictor import Bounds, Evictor
from kvlocal.engine.sequence import Sequence, append
from kvlocal.measure.bench_config import BenchConfig, Result, Step
from kvlocal.measure.variants import Variant
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.model import Model
from kvlocal.storage.budget import Budget

Clock = Callable[[], float]


def random_tokens(model: Model, n: int, seed: int = 0) -> np.ndarray:
    """Token ids to measure with, int32 ``[n]``: always the same, without control tokens and ends of text."""
    rng = np.random.default_rng(seed)
    out = rng.integers(model.n_vocab, size=n, dtype=np.int32)
    while True:
        special = [t for t in np.unique(out) if model.llama.llama_vocab_is_control(model.vocab, t) or model.is_end(t)]
        bad = np.isin(out, special)
        if not bad.any():
            return out
        out[bad] = rng.integers(model.n_vocab, size=int(bad.sum()), dtype=np.int32)


#
# the measurement
#


class Lane:
    """One variant on its way through the depths: its context, and what it took so far.

    Sequence 0 is the text. Exact prefill that evicts or demotes does so in a branch, sequence 1, which is decoded from:
    the text stays whole for the next depth. (Pages shared with it are not given back there, so the release of their
    memory is not in ``evict_s``.) Whatever is measured is cut off again; tokens that are demoted while decoding would
    stay demoted, so then each round has a branch of its own, sequence 2.
    """

    def __init__(
        self, variant: Variant, context: Context, config: BenchConfig, tokens: np.ndarray, clock: Clock
    ) -> None:
        self.variant = variant
        self.context = context
        self._config = config
        self._tokens = tokens
        self._clock = clock
        self._step = min(config.chunk if variant.chunked else config.n_ubatch, config.n_batch)
        self._branches = (variant.policy.evicts or variant.demotes) and not variant.chunked
        store = variant.store
        bounds = Bounds(variant.policy, variant.budget, store, config.n_ctx, config.evict_every, variant.retriever)
        self._evictor = Evictor(context, bounds)
        self._demoter = Evictor(context, replace(bounds, budget=Budget.parse("100%"), retriever=None))
        self._text, *self._copies = [Sequence(context, seq) for seq in range(3)]
        self._sequence = self._copies[0] if self._branches else self._text
        self.pos = 0
        self.prompt_s = self.evict_s = 0.0
        self.peak_bytes = 0
        self._prefill_tps: list[float] = []
        self._decode_tps: list[float] = []
        self._used = 0
        self._attended = 0.0

    def _run(self, begin: int, end: int, sequence: Sequence, outputs: Literal["last", "none"]) -> None:
        """Decode the text from ``begin`` to ``end`` as one batch, and wait for it: accelerators run on their own."""
        append({sequence: self._tokens[begin:end].tolist()}, outputs=outputs)
        self.context.model.llama.llama_synchronize(self.context.handle)

    def _shrink(self, sequence: Sequence, *, evicts: bool) -> float:
        """Bring a sequence down to the budget, if ``evicts``, and demote what has left the tail; seconds."""
        start = self._clock()
        (self._evictor if evicts else self._demoter).after(sequence, "prompt")
        return self._clock() - start

    def advance(self, depth: int) -> None:
        """One step of prefill towards ``depth``."""
        end = min(self.pos + self._step, depth)
        start = self._clock()
        self._run(self.pos, end, self._text, "none")
        self.prompt_s += self._clock() - start
        self.pos = end
        if self.variant.chunked:
            self.evict_s += self._shrink(self._text, evicts=True)

    def arrive(self) -> None:
        """The text is as long as the depth: note the memory, shrink the branch, forget the last depth's rounds."""
        cache, stats = self.context.cache, self.context.stats()
        if cache is None:
            peak = stats.used_bytes
        else:
            peak = stats.peak_bytes if self.variant.chunked else stats.allocated_bytes
        self.peak_bytes = max(self.peak_bytes, int(peak))
        if self._branches:
            self._text.branch(self._sequence)
            self.evict_s = self._shrink(self._sequence, evicts=self.variant.policy.evicts)
        self._prefill_tps, self._decode_tps = [], []
        self._used = self._used_bytes(self._sequence)

    def leave(self) -> None:
        """Back to the text alone, on the way to the next depth."""
        if self._branches:
            self._sequence.release()
        if self.context.cache is not None:
            self.context.cache.reset_peak()

    def warm_up(self) -> None:
        if self._config.n_gen:
            self._decode(1)
        if self._config.n_prompt:
            self._read(min(self._config.n_prompt, self._step))

    def measure(self) -> None:
        """One round: decode, then a batch."""
        if self._config.n_gen:
            self._decode_tps.append(self._config.n_gen / self._decode(self._config.n_gen))
        if self._config.n_prompt:
            self._prefill_tps.append(self._config.n_prompt / self._read(self._config.n_prompt))

    def _decode(self, n: int) -> float:
        sequence, every, n_left = self._sequence, n, len(self._sequence.tokens)
        if self.variant.demotes:
            sequence, every, n_left = self._copies[1], self._config.evict_every, 0
            self._sequence.branch(sequence)
        way_back = sequence.mark(logits=False)
        self._evictor.choose(sequence)
        seconds = read = chosen = 0.0
        for begin in range(0, n, every):
            n_step = min(every, n - begin)
            before = self._used_bytes(sequence)
            start = self._clock()
            for pos in range(self.pos + begin, self.pos + begin + n_step):
                self._run(pos, pos + 1, sequence, "last")
                self.context.logits()
                step = self._evictor.choose(sequence)
                chosen += step.n_read if step else 0.0
            seconds += self._clock() - start
            # the i-th of m tokens attends to i more than were there: on average to (m + 1) / 2m of what all m add
            read += n_step * before + (self._used_bytes(sequence) - before) * (n_step + 1) / 2
            if self.variant.demotes and n_step == every:
                seconds += self._shrink(sequence, evicts=False)
        if chosen:  # of what is held, a part
            read *= chosen / n / max(self._held(sequence), 1)
        self._attended = read / n
        sequence.back(way_back) if n_left else sequence.release()
        return seconds

    def _read(self, n: int) -> float:
        way_back = self._text.mark(logits=False)
        start = self._clock()
        for begin in range(self.pos, self.pos + n, self._config.n_batch):
            end = min(begin + self._config.n_batch, self.pos + n)
            self._run(begin, end, self._text, "last" if end == self.pos + n else "none")
        seconds = self._clock() - start
        self._text.back(way_back)
        return seconds

    def _used_bytes(self, sequence: Sequence) -> int:
        cache = self.context.cache
        return int(self.context.stats().used_bytes) if cache is None else int(cache.seq_stats(sequence.seq).used_bytes)

    def _held(self, sequence: Sequence) -> float:
        """Tokens per layer and KV head."""
        cache = self.context.cache
        return float(self.pos) if cache is None else cache.mean_slots(sequence.seq)

    def result(self) -> Result:
        """What was measured at this depth."""
        cache, n_gen, depth = self.context.cache, self._config.n_gen, self.pos
        prefill, decode = _spread(self._prefill_tps), _spread(self._decode_tps)
        seconds = self.prompt_s + self.evict_s
        if cache is None:
            held, full_bytes = float(depth), int(self.context.stats().full_bytes)
        else:
            stats = cache.seq_stats(self._sequence.seq)
            held, full_bytes = stats.n_slots / stats.n_heads, int(stats.full_bytes)
        return Result(
            model=self.context.model.name,
            policy=self.variant.name,
            storage=self.variant.storage,
            budget=str(self.variant.budget),
            prefill=self.variant.prefill,
            reads=str(self.variant.retriever or ""),
            depth=depth,
            n_prompt=self._config.n_prompt,
            n_gen=n_gen,
            prefill_tps=prefill[0],
            prefill_tps_min=prefill[1],
            prefill_tps_max=prefill[2],
            decode_tps=decode[0],
            decode_tps_min=decode[1],
            decode_tps_max=decode[2],
            prompt_s=self.prompt_s,
            prompt_tps=depth / seconds if depth else None,
            ttft_s=seconds + 1 / decode[0] if depth and decode[0] else None,
            evict_s=self.evict_s if self.variant.policy.evicts or self.variant.demotes else None,
            held_mean=held,
            used_bytes=self._used,
            peak_bytes=self.peak_bytes,
            full_bytes=full_bytes,
            attention_bytes_per_token=self._attended if n_gen else None,
        )


def _spread(values: Several[float]) -> tuple[float | None, float | None, float | None]:
    """Median, least, most; ``None`` of nothing."""
    return (statistics.median(values), min(values), max(values)) if values else (None, None, None)


def bench(
    model: Model,
    config: BenchConfig,
    on_step: Callable[[Step], None] = lambda _step: None,
    *,
    clock: Clock = time.perf_counter,
    open_context: Callable[[Model, ContextConfig], Context] = Context,
) -> Iterator[Result]:
    """Measure; the results of a depth follow when all variants are through with it, depths ascending.

    ``on_step`` is called between any two steps and may raise to stop; results that came before remain valid.

    Raises:
        UsageError: the model cannot be served by the paged cache; a budget that cannot be.
        KVError: no memory, or the computation failed.
    """
    if any(variant.paged for variant in config.variants):
        model.check_paged()
    tokens = random_tokens(model, config.n_text)
    with ExitStack() as stack:
        lanes = [
            Lane(variant, _open(model, config, variant, open_context, stack), config, tokens, clock)
            for variant in config.variants
        ]
        for depth in sorted(set(config.depths)):
            while (lane := min(lanes, key=lambda lane: lane.pos)).pos < depth:
                on_step(Step(depth, lane.variant.label, "prefill", lane.pos, depth))
                lane.advance(depth)
            for lane in lanes:
                on_step(Step(depth, lane.variant.label, "measure", 0, config.repetitions))
                lane.arrive()
                lane.warm_up()
            for done in range(config.repetitions):
                for lane in lanes:
                    on_step(Step(depth, lane.variant.label, "measure", done, config.repetitions))
                    lane.measure()
            yield from [lane.result() for lane in lanes]
            for lane in lanes:
                lane.leave()


def _open(
    model: Model,
    config: BenchConfig,
    variant: Variant,
    open_context: Callable[[Model, ContextConfig], Context],
    stack: ExitStack,
) -> Context:
    """A context with room for the whole text, closed with ``stack``; paged ones have sequences for the branches."""
    n_seq_max = 1 + variant.paged + variant.demotes
    context = open_context(
        model,
        ContextConfig(
            n_ctx=config.n_ctx,
            n_batch=max(config.n_batch, n_seq_max),
            n_ubatch=config.n_ubatch,
            n_threads=config.n_threads,
            n_seq_max=n_seq_max,
            paged=variant.paged,
            n_window=variant.n_window,
            mass=variant.policy.mass,
            formats=variant.formats,
            rotate=variant.rotates,
            kivi_bits=variant.store.bits,
            kivi_group=variant.store.group,
            type_kv=variant.type_kv,
            portable=variant.paged and config.kernels == "portable",
        ),
    )
    stack.callback(context.close)
    if context.cache is not None and variant.policy.evicts:
        memory = psutil.virtual_memory().total
        variant.store.check(variant.budget, context.cache, variant.policy, config.n_ctx, memory)
    return context
