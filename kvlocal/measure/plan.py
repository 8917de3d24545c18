"""How much memory a run will take, before it is allocated: weights, cache and buffers as the library counts them.

Nothing is computed from formulas: a model without weights says what it would allocate, and a :class:`Rehearsal` of the
run takes the pages that the run would take. Only the scores are invented: which tokens each head keeps, and so the
waste in partly filled pages, is that of another text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from kvlocal.engine.config import EngineConfig
from kvlocal.errors import KVError, UsageError
from kvlocal.measure.rehearsal import Rehearsal, grown
from kvlocal.native.context import Context
from kvlocal.native.devices import Placement, list_devices, placements
from kvlocal.native.model import Model
from kvlocal.native.threads import usable_cores
from kvlocal.policies import make_policy
from kvlocal.settings import POLICY, STORED_POLICY
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import STORAGES, Storage

STEP = 256
"""Suggested contexts are multiples of this many tokens."""

_BUDGETS = (2048, 1024, 512, 256)
_MAX_TRIES = 8

Options = dict[str, Any]
"""Settings of a command by the names they have in :class:`EngineConfig`, the policy by its own name, the budget and the
storage as they are written."""


@dataclass(frozen=True)
class KVPlan:
    """Bytes of the cache.

    Attributes:
        full_bytes: a full f16 cache of all tokens.
        used_bytes: in use at the end; peak_bytes: the most ever taken.
        query_bytes: the window queries that a policy remembers (f32).
        table_bytes: page tables, positions, accumulated mass and what stands for a retriever's units, at their peak.
        recall_bytes: what an archive may bring back, beside the rest; archive_bytes: of it, on disk.
    """

    full_bytes: int
    used_bytes: int
    peak_bytes: int
    query_bytes: int
    table_bytes: int
    recall_bytes: int = 0
    archive_bytes: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes.

    Attributes:
        weights_bytes, compute_bytes: wherever they lie.
        total_bytes: of main memory: weights, the cache at its peak with its queries and tables, compute buffers.
        device_bytes: of accelerators, likewise.
        pages: where layers have their pages, and how attention over them is computed; empty on llama.cpp's own cache.
    """

    weights_bytes: int
    kv: KVPlan
    compute_bytes: int
    total_bytes: int
    device_bytes: int = 0
    pages: list[Placement] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A run: what it takes, whether that fits, and what would fit.

    Attributes:
        n_ctx: tokens of context per sequence; n_prompt: tokens of the prompt; n_generate: tokens generated after it.
        parallel: sequences in one cache.
        threads: threads that compute; threads_reason: why this number.
        free_bytes: main memory available; device_free_bytes: memory available on accelerators.
        max_context: by storage, the largest context that fits when a prompt fills it, tokens, at most what the model
            was trained for (or what was asked for); 0: none fits; ``None``: the storage cannot serve this model or
            policy. A policy that chooses formats itself has one entry, under its own name.
        suggestion: what to change so that it fits; empty if it does, or if nothing helps.
    """

    model: str
    policy: str
    budget: str
    storage: str
    prefill: str
    n_ctx: int
    n_prompt: int
    n_generate: int
    parallel: int
    threads: int
    threads_reason: str
    need: Need
    free_bytes: int
    device_free_bytes: int
    fits: bool
    max_context: dict[str, int | None] = field(default_factory=dict)
    suggestion: Options = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints; what :class:`Need` holds stands beside the rest."""
        out = asdict(self)
        need = out.pop("need")
        return need | out


class Planner:
    """Plans runs of one model, whose file is read but for its weights. Use as a context manager.

    Args:
        path: the GGUF file; of a split model the first part.
        n_gpu_layers: layers on the accelerator.
        free_bytes: main memory to plan for; ``None``: what is available now. This process already has what a run takes
            beside weights, cache and buffers.

    Raises:
        KVError: the file is truncated or corrupted.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int = 0, free_bytes: int | None = None) -> None:
        self.model = Model(path, n_gpu_layers=n_gpu_layers, no_alloc=True)
        self.free_bytes = int(psutil.virtual_memory().available) if free_bytes is None else free_bytes
        self.device_free_bytes = 0
        self._devices = list_devices()

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def plan(self, config: EngineConfig, n_prompt: int = 0, n_generate: int = -1) -> Plan:
        """Plan ``config.n_seq_max`` prompts of ``n_prompt`` tokens (0: all that the context has room for), each
        followed by ``n_generate`` (-1: 512, or a quarter of the context if that is less).

        Raises:
            UsageError: the settings are impossible, or the prompt does not fit into the context.
            KVError: the cache cannot be created.
        """
        config = replace(config, n_ctx=config.n_ctx or self.model.n_ctx_train)
        n_generate = min(512, config.n_ctx // 4) if n_generate < 0 else n_generate
        needed = n_prompt or 1
        n_prompt = n_prompt or config.n_ctx - 1 - n_generate
        if n_prompt < 1:
            raise UsageError(
                f"A context of {config.n_ctx} tokens has no room for a prompt and {n_generate} tokens after it; use a "
                "larger context (-c) or a smaller --generate."
            )
        need = self.need(config, n_prompt, n_generate)
        fits = self.fits(need)
        cores = usable_cores()
        max_context = self.max_contexts(config, n_generate)
        return Plan(
            model=self.model.name,
            policy=config.policy.name,
            budget=str(config.budget),
            storage=config.storage.name,
            prefill=config.prefill,
            n_ctx=config.n_ctx,
            n_prompt=n_prompt,
            n_generate=n_generate,
            parallel=config.n_seq_max,
            threads=config.n_threads or cores.threads,
            threads_reason="as asked for" if config.n_threads else cores.reason,
            need=need,
            free_bytes=self.free_bytes,
            device_free_bytes=self.device_free_bytes,
            fits=fits,
            max_context=max_context,
            suggestion={} if fits else self._suggest(config, n_prompt, n_generate, needed, max_context),
        )

    def fits(self, need: Need) -> bool:
        return self._left(need) >= 0

    def _left(self, need: Need) -> int:
        """Bytes to spare, in main memory or on the accelerator, whichever has less."""
        left = self.free_bytes - need.total_bytes
        return min(left, self.device_free_bytes - need.device_bytes) if need.device_bytes else left

    def need(self, config: EngineConfig, n_prompt: int, n_generate: int, *, to_peak: bool = False) -> Need:
        """Bytes of one run, rehearsed; ``to_peak``: no further than to its peak, so that ``used_bytes`` is of then.

        Raises:
            UsageError: the settings are impossible.
            KVError: the cache cannot hold the run.
        """
        paged = config.paged
        # sequences share the cells of llama.cpp's own cache, and each has a context of its own in ours
        config = config if paged else replace(config, n_ctx=config.n_ctx * config.n_seq_max)
        with Rehearsal(config, self.model) as run:
            n_played = run.enough(n_prompt)
            lengths = run.lengths(n_played, n_generate)
            if len(lengths) == 1:
                run.play(n_played, n_generate, to_peak=to_peak)
                return self._taken(run, run.context, n_prompt - n_played)
            # our own cache takes longer, the more it has room for; llama.cpp's takes all of its room from the start
            room = lengths[1] + n_generate + 1
            with Rehearsal(replace(config, n_ctx=min(config.n_ctx, room)) if paged else config, self.model) as small:
                needs = []
                for n in lengths:
                    small.again()
                    small.play(n, n_generate, to_peak=to_peak)
                    needs.append(self._taken(small, run.context))
        # a budget in tokens or bytes is all that is held in the end, whatever the length
        settled = paged and config.budget.unit != "percent" and not to_peak
        return _grown(needs[0], needs[1], lengths, n_prompt, settled=settled)

    def _taken(self, run: Rehearsal, context: Context, n_left: int = 0) -> Need:
        """What has been played takes in ``context``; ``n_left``: tokens of a prompt that were not, and would change
        nothing."""
        kv, stats = run.report().kv, context.stats()
        if run.cache is not None:
            kv.full_bytes += run.cache.bytes_per_token * n_left * run.config.n_seq_max
        main, device = context.breakdown(), context.breakdown(on_device=True)
        if context is not run.context:
            # a decode may have made the buffers larger
            for ours, theirs in ((main, run.context.breakdown()), (device, run.context.breakdown(on_device=True))):
                ours.compute_bytes = max(ours.compute_bytes, theirs.compute_bytes)
        self.device_free_bytes = int(device.free_bytes)
        query_bytes = int(stats.query_bytes)
        # what lies on an accelerator is allocated whole; the rest shrinks in proportion
        on_device = min(device.context_bytes / (stats.reserved_bytes + query_bytes), 1)
        recall_bytes, archive_bytes = _archived(run, int(stats.archive_bytes), n_left)
        cache = round((kv.peak_bytes + query_bytes) * (1 - on_device)) + run.peak_table_bytes + recall_bytes
        return Need(
            weights_bytes=int(main.model_bytes + device.model_bytes),
            kv=KVPlan(
                *(kv.full_bytes, kv.used_bytes, kv.peak_bytes, query_bytes, run.peak_table_bytes),
                *(recall_bytes, archive_bytes),
            ),
            compute_bytes=int(main.compute_bytes + device.compute_bytes),
            total_bytes=int(main.model_bytes + main.compute_bytes) + cache,
            device_bytes=int(device.model_bytes + device.context_bytes + device.compute_bytes),
            pages=placements(context.cache.layers, self._devices) if context.cache is not None else [],
        )

    #
    # what would fit
    #

    def max_contexts(self, config: EngineConfig, n_generate: int) -> dict[str, int | None]:
        """See :class:`Plan`."""
        if config.policy.formats:
            return {config.policy.name: self.max_context(config, n_generate)}
        out: dict[str, int | None] = {}
        for name in STORAGES:
            found = [n for n in out.values() if n]
            try:
                stored = _stored(config, name)
            except UsageError:  # not with this policy, or not with these kernels
                out[name] = None
            else:
                out[name] = self.max_context(stored, n_generate, found[-1] if found else 0)
        return out

    def max_context(self, config: EngineConfig, n_generate: int, near: int = 0) -> int | None:
        """The largest context that fits when a prompt fills it, tokens; 0: none does; ``None``: it cannot be.

        Runs are rehearsed, each as long as those before it say, their bytes taken to grow evenly. ``near``: a guess.
        """
        cap = max(self.model.n_ctx_train, config.n_ctx)
        known: dict[int, int] = {}

        def left(n_ctx: int) -> int:
            need = self.need(replace(config, n_ctx=n_ctx), n_ctx - 1 - n_generate, n_generate, to_peak=True)
            known[n_ctx] = self._left(need)
            return known[n_ctx]

        low = min(_least(config, n_generate), cap)
        high, guess = cap + 1, min(near or 2 * low, cap)
        try:
            if left(low) < 0:
                return 0
            while low < guess < high and len(known) < _MAX_TRIES:
                low, high = (guess, high) if left(guess) >= 0 else (low, guess)
                guess = _next(known, low, high, cap)
        except (UsageError, KVError):
            return max((n_ctx for n_ctx, n_bytes in known.items() if n_bytes >= 0), default=None)
        return low

    def _suggest(
        self, config: EngineConfig, n_prompt: int, n_generate: int, needed: int, max_context: dict[str, int | None]
    ) -> Options:
        """The first of :func:`alternatives` that fits, else a smaller context that has room for ``needed`` tokens of
        the prompt."""
        for options, other in alternatives(config, n_prompt + n_generate + 1):
            try:
                if self.fits(self.need(other, n_prompt, n_generate)):
                    return options
            except (UsageError, KVError):
                continue
        fitting = [(n, name) for name, n in max_context.items() if n and n > needed + n_generate]
        if not fitting:
            return {}
        own = config.policy.name if config.policy.formats else config.storage.name
        n_ctx, name = max(fitting, key=lambda each: (each[1] == own, each[0]))
        return {"n_ctx": n_ctx} | ({} if name == own else {"storage": name})


def alternatives(config: EngineConfig, n_tokens: int) -> Iterator[tuple[Options, EngineConfig]]:
    """Runs that take less, the least change first: what changes, and the settings.

    A smaller context while all tokens fit into it; chunks; a smaller budget, under the default policy if there was none
    (without page kernels, another one).
    ``n_tokens``: of a sequence.
    """
    n_ctx = -(-n_tokens // STEP) * STEP
    if n_ctx < config.n_ctx:
        yield {"n_ctx": n_ctx}, replace(config, n_ctx=n_ctx)
    evicts = config.policy.evicts
    chunked = replace(config, prefill="chunked")
    if config.prefill != "chunked" and (evicts or config.storage.demotes):
        yield {"prefill": "chunked"}, chunked
    options: Options = {"prefill": "chunked"}
    if not evicts:
        policy = STORED_POLICY if config.kernels == "portable" else POLICY.default
        options |= {"policy": policy, "storage": "f16"}
        chunked = replace(chunked, policy=make_policy(policy), storage=Storage())
    for n in _BUDGETS:
        smaller = not (evicts and config.budget.unit == "tokens" and config.budget.value <= n)
        if smaller and n >= chunked.policy.min_budget and n + config.chunk + config.guide <= config.n_ctx:
            yield {"budget": str(n), **options}, replace(chunked, budget=Budget("tokens", n))


def _archived(run: Rehearsal, archive_bytes: int, n_left: int) -> tuple[int, int]:
    """Bytes that may be recalled, and of the archive, once ``n_left`` tokens more of every prompt are read."""
    if run.cache is None or run.config.archive is None:
        return 0, 0
    n_read = sum(len(sequence.tokens) for sequence in run.sequences)
    n_all = n_read + n_left * run.config.n_seq_max
    recalled = min(run.config.recalled * run.config.n_seq_max, n_all)
    return recalled * run.cache.bytes_per_token, archive_bytes * n_all // max(n_read, 1)


def _grown(first: Need, second: Need, lengths: tuple[int, ...], n_prompt: int, *, settled: bool) -> Need:
    """What a prompt takes that is longer than two that were rehearsed; ``settled``: it holds as much in the end."""
    a, b = first.kv, second.kv
    kv = KVPlan(
        full_bytes=grown(a.full_bytes, b.full_bytes, lengths, n_prompt),
        used_bytes=b.used_bytes if settled else grown(a.used_bytes, b.used_bytes, lengths, n_prompt),
        peak_bytes=grown(a.peak_bytes, b.peak_bytes, lengths, n_prompt),
        query_bytes=b.query_bytes,
        table_bytes=grown(a.table_bytes, b.table_bytes, lengths, n_prompt),
        recall_bytes=b.recall_bytes,
        archive_bytes=grown(a.archive_bytes, b.archive_bytes, lengths, n_prompt),
    )
    return replace(second, kv=kv, total_bytes=grown(first.total_bytes, second.total_bytes, lengths, n_prompt))


def _stored(config: EngineConfig, name: str) -> EngineConfig:
    if name == config.storage.name:
        return config
    return replace(config, storage=Storage(name, tail=config.storage.tail))


def _least(config: EngineConfig, n_generate: int) -> int:
    """About the smallest context that the settings allow."""
    n = n_generate + 2
    if config.prefill == "chunked":
        budget = int(config.budget.value) if config.budget.unit == "tokens" else 0
        n += max(budget, config.policy.min_budget) + config.chunk + config.guide
    return -(-n // STEP) * STEP


def _next(known: dict[int, int], low: int, high: int, cap: int) -> int:
    """The context to try next: where nothing is left, on the line through two that are known; ``low`` when that is as
    good as found.

    ``known``: bytes left, by context; low: the largest known to fit; high: the smallest known not to, else cap + 1.
    """
    below = [n for n in sorted(known) if n <= low]
    a, b = (low, high) if high <= cap else (below[-2], low)
    slope = (known[a] - known[b]) / (b - a)
    at = cap if slope <= 0 else int(a + known[a] / slope)
    if at >= cap < high:
        return cap
    return max(low, at // STEP * STEP)
