"""Model, cache and policy together: knows when to prefill, evict, decode and evict again."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Literal

import numpy as np
import psutil

from kvlocal import native
from kvlocal.budget import PAGE_SLOTS
from kvlocal.cache import PagedCache
from kvlocal.config import EngineConfig
from kvlocal.context import Context, ContextConfig
from kvlocal.errors import KVError, UsageError
from kvlocal.evict import evict, guided_scores, size
from kvlocal.model import Model
from kvlocal.report import KV, RSS, Budgeted, Report, Timing, Tokens, peak_rss_bytes, rss_bytes
from kvlocal.sampling import Sampler, Sampling

Progress = Callable[[int, int], None]


class Engine:
    """One model and its cache. Use as a context manager, or :meth:`close` it.

    Raises:
        UsageError: the model's architecture or the settings cannot be served.
        KVError: the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        start = time.perf_counter()
        self.config = config
        self.policy = config.policy
        self.model = self._load()
        try:
            self._open()
        except BaseException:
            self._unload()
            raise
        self._load_s = time.perf_counter() - start
        self.reset()

    def _load(self) -> Model:
        return Model(self.config.model, n_gpu_layers=self.config.n_gpu_layers)

    def _unload(self) -> None:
        self.model.close()

    def _memory_bytes(self) -> int | None:
        """What a budget must not exceed, ``None``: anything goes."""
        return int(psutil.virtual_memory().total)

    def _open(self) -> None:
        config = self.config
        paged = self.policy.evicts or config.storage.demotes
        formats = config.storage.formats
        if paged:
            self.model.check_paged()
            formats = tuple(filter(self.model.stores, self.policy.formats)) or formats
        self.n_ctx = config.n_ctx or self.model.n_ctx_train
        if self._chunked:
            budget = int(config.budget.value) if config.budget.unit == "tokens" else self.policy.min_budget
            if budget + config.chunk + config.guide > self.n_ctx:
                guide = f" and a guide of {config.guide}" if config.guide else ""
                raise UsageError(
                    f"A budget of {budget} tokens and a chunk of {config.chunk}{guide} do not fit into a context of "
                    f"{self.n_ctx}; use a larger context (-c), a smaller --chunk or a smaller budget."
                )
        self.context = Context(
            self.model,
            ContextConfig(
                n_ctx=self.n_ctx,
                n_batch=max(config.n_batch, config.n_seq_max),
                n_ubatch=config.n_ubatch,
                n_threads=config.n_threads,
                n_seq_max=config.n_seq_max,
                n_outputs=config.n_outputs,
                paged=paged,
                formats=formats,
                rotate=bool(formats) and (bool(self.policy.formats) or config.storage.rotates),
                kivi_bits=config.storage.bits,
                kivi_group=config.storage.group,
                n_window=self.policy.n_window,
                mass=self.policy.mass,
            ),
        )
        self.cache = self.context.cache
        self._hook_errors: list[BaseException] = []
        if self.cache is not None:
            try:
                config.storage.check(config.budget, self.cache, self.policy, self.n_ctx, self._memory_bytes())
            except BaseException:
                self.context.close()
                raise
            self.context.set_evict_hook(native.evict_hook(self._on_event, self._hook_errors))

    def close(self) -> None:
        self.context.close()
        self._unload()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget all sequences and measurements; the model stays loaded."""
        for seq in range(self.config.n_seq_max):
            self.context.truncate(seq, 0)
        if self.cache is not None:
            self.cache.reset_peak()
        self.tokens: list[list[int]] = [[] for _ in range(self.config.n_seq_max)]  # all that was read, per sequence
        self._rolled = [0] * self.config.n_seq_max  # tokens read minus the next position: what renumbering took away
        self.finish_reason: str | None = None
        self._text = ""
        self._n_prompt = self._n_generated = 0
        self._prefill_s = self._decode_s = self._evict_s = self._ttft_s = 0.0
        self._n_prefilled = 0
        self._rss = RSS()

    @property
    def model_name(self) -> str:
        return self.model.name

    @property
    def n_max(self) -> int:
        """Most tokens of a sequence: the cache bounds those that keep everything, positions those that do not roll."""
        if self._bounded and self.policy.rolls:
            return 2**31 - 1
        return max(self.n_ctx, self.model.n_ctx_train) if self._bounded else self.n_ctx

    @property
    def _bounded(self) -> bool:
        return self.policy.evicts and not self.config.budget.keeps_all

    @property
    def _chunked(self) -> bool:
        return self._bounded and self.config.prefill == "chunked"

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return self.model.chat_tokens(messages)

    #
    # eviction
    #

    def _on_event(self, seq: int, event: int) -> None:
        # what comes next must find room in the cache, whatever the budget allows
        rooms = {native.EVENT_CHUNK: self._chunk_room, native.EVENT_LIMIT: self.n_ctx - self.config.evict_every}
        # a step while decoding never waits for more than one page of each head
        self.evict(seq, room=rooms.get(event), n_pages=int(event == native.EVENT_LIMIT))

    @property
    def _chunk_room(self) -> int:
        return self.n_ctx - self.config.chunk - self.config.guide

    def budget_tokens(self, seq: int = 0) -> int:
        """The budget of a sequence now, tokens per head and layer on average."""
        n_seen = self.context.n_seen(seq) + self._rolled[seq]
        if self.cache is None or not self._bounded:
            return n_seen
        return self.config.storage.tokens(self.config.budget, n_seen, self.cache, self.policy)

    def evict(self, seq: int = 0, *, room: int | None = None, guide: Sequence[int] = (), n_pages: int = 0) -> bool:
        """Bring a sequence down to its budget, or to ``room`` tokens per head if that is less, and demote what is due.

        ``guide``: tokens whose attention decides, as if they came next; they are not kept. ``n_pages``: most pages per
        head that the storage demotes, 0: all that are due.

        Returns:
            ``False`` if it already holds no more.
        """
        if self.cache is None:
            return False
        start = time.perf_counter()
        evicted = self._bounded and self._evict(self.cache, seq, room, guide)
        demoted = self.config.storage.store(self.cache, seq, self.policy.n_window, n_pages)
        self.cache.set_limit(seq, self._limit(self.cache, seq))
        if evicted or demoted:
            self._evict_s += time.perf_counter() - start
        return evicted

    def _limit(self, cache: PagedCache, seq: int) -> int:
        """Tokens per head at which a growing sequence is looked at again, 0: never."""
        every = self.config.evict_every
        if self._bounded and self.policy.formats:
            left = int(self.policy.limit(self.budget_tokens(seq), every) - size(cache, seq, self.policy))
            return cache.mean_slots(seq) + max(left, every - 1)
        limit = self.n_ctx - 1
        if self._bounded:
            limit = min(limit, self.policy.limit(self.budget_tokens(seq), every))
        if self.config.storage.demotes:
            limit = min(limit, cache.mean_slots(seq) + min(every, PAGE_SLOTS) - 1)
        return limit if self._bounded or self.config.storage.demotes else 0

    def _evict(self, cache: PagedCache, seq: int, room: int | None, guide: Sequence[int]) -> bool:
        budget = self.budget_tokens(seq)
        if room is not None:
            budget = min(budget, max(room, self.policy.min_budget))
        rss = rss_bytes()
        n_window = self.policy.n_window
        read_scores = partial(guided_scores, self.context, seq, guide, n_window) if guide else None
        n_seen = self.context.n_seen(seq)
        if not evict(cache, seq, self.policy, budget, read_scores, self.n_ctx):
            return False
        self._rolled[seq] += n_seen - self.context.n_seen(seq)
        if self._rss.before_evict_bytes is None:
            self._rss.before_evict_bytes, self._rss.after_evict_bytes = rss, rss_bytes()
        return True

    #
    # prefill
    #

    def prefill(self, tokens: Sequence[int], *, seq: int = 0, on_progress: Progress | None = None) -> None:
        """Append a prompt to a sequence and evict at its end (``exact``) or after every chunk (``chunked``).

        Raises:
            UsageError: the prompt is empty or longer than the context; nothing has changed then.
            KVError: the cache is full; the sequence is as before.
        """
        self._make_room(len(tokens), seq)
        self._check_prompt(len(tokens), seq, len(self.tokens[seq]))
        # one pass through the graph at a time: progress is seen, and an interruption is heard, in between
        step = self.config.n_ubatch if self.config.prefill == "exact" else self.config.chunk
        step = min(step, self.config.n_batch)
        start, evict_s = time.perf_counter(), self._evict_s
        begin = len(self.tokens[seq])
        try:
            for i in range(0, len(tokens), step):
                part = tokens[i : i + step]
                last = i + len(part) == len(tokens)
                event = native.EVENT_PROMPT if last else native.EVENT_CHUNK
                if self.config.prefill == "exact" and not last:
                    event = native.EVENT_NONE
                    self._set_limit(seq, 0)  # an exact prompt is seen whole, whatever the budget
                guide = tokens[-self.config.guide :] if self._chunked and self.config.guide and not last else ()
                if guide:
                    event = native.EVENT_NONE  # the eviction follows below
                    self._set_limit(seq, 0)
                self._decode(part, seq, outputs="last" if last else "none", event=event)
                if guide:
                    self.evict(seq, room=self._chunk_room, guide=guide)
                if on_progress:
                    on_progress(i + len(part), len(tokens))
        except BaseException:
            self._roll_back(seq, begin)
            raise
        self._n_prompt += len(tokens)
        self._n_prefilled += len(tokens)
        self._prefill_s += time.perf_counter() - start - (self._evict_s - evict_s)

    def _held(self, seq: int) -> int:
        """What the policy counts per head, rounded up; see :func:`kvlocal.evict.size`."""
        return math.ceil(size(self.cache, seq, self.policy)) if self.cache is not None else len(self.tokens[seq])

    def _evicted_at(self, seq: int) -> int:
        """Of the tokens read before this one some may be missing."""
        return self.cache.evicted_at(seq) + self._rolled[seq] if self.cache is not None else 0

    def _make_room(self, n: int, seq: int) -> None:
        """A prompt that is read whole, after what is already there, may need an eviction before it."""
        room = self.n_ctx - n - 1
        fits = len(self.tokens[seq]) + n < self.n_max and room >= self.policy.min_budget
        if self._bounded and not self._chunked and fits and self._held(seq) > room:
            self.evict(seq, room=room)

    def _check_prompt(self, n: int, seq: int, n_seen: int) -> None:
        """Positions must stay below ``n_max``; a prompt that is read whole must also fit into the cache.

        ``n_seen`` tokens of the sequence stay before it.
        """
        if n == 0:
            raise UsageError("The prompt is empty; give some text.")
        room = self.n_max - n_seen
        if not self._chunked:
            held = self._held(seq) - (len(self.tokens[seq]) - n_seen)
            room = min(room, self.n_ctx - max(held, 0))
        if n < room:
            return
        if self._chunked:
            hint = f"the model was trained for {self.model.n_ctx_train}; to go beyond, use a larger context (-c)"
        elif self.policy.evicts:
            hint = "use --prefill chunked, which needs room only for the budget, or a larger context (-c)"
        else:
            hint = "use a larger context (-c), or a policy that evicts with --prefill chunked"
        before = f" after the {n_seen} already read" if n_seen else ""
        raise UsageError(f"The prompt has {n} tokens, the context has room for {max(room - 1, 0)}{before}; {hint}.")

    def _set_limit(self, seq: int, n_slots: int) -> None:
        if self.cache is not None:
            self.cache.set_limit(seq, n_slots)

    def _decode(self, tokens: Sequence[int], seq: int, *, outputs: Literal["last", "none"], event: int) -> None:
        self._hook_errors.clear()
        try:
            self.context.decode(tokens, self.context.n_seen(seq), seq, outputs=outputs, event=event)
        except KVError:
            if self._hook_errors:
                # the step was computed and is in the cache; only the eviction after it failed
                self.tokens[seq].extend(tokens)
                raise self._hook_errors[0] from None
            raise
        self.tokens[seq].extend(tokens)

    def _roll_back(self, seq: int, n: int) -> None:
        """Cut a sequence back to n tokens; one that was evicted since then starts anew on its next use."""
        if self._evicted_at(seq) > n:
            n = self._rolled[seq] = 0
        self.context.truncate(seq, n - self._rolled[seq])
        del self.tokens[seq][n:]

    def extend(self, tokens: Sequence[int], *, seq: int = 0, on_progress: Progress | None = None) -> bool:
        """Make a sequence end in exactly ``tokens``, reading only what is new.

        Returns:
            Whether it had to be read again from the beginning, because the change lies in what was evicted.
        """
        have = self.tokens[seq]
        common = 0
        for ours, theirs in zip(have, tokens, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(tokens) - 1)  # the last token must be computed to have logits
        reread = common < len(have) and common < self._evicted_at(seq)
        common = 0 if reread else common
        if common < len(have):
            self._check_prompt(len(tokens) - common, seq, common)
            self._roll_back(seq, common)
        self.prefill(tokens[len(self.tokens[seq]) :], seq=seq, on_progress=on_progress)
        return reread

    #
    # generate
    #

    def generate(self, n_predict: int, sampling: Sampling, *, seq: int = 0) -> Iterator[str]:
        """The answer to what was prefilled, as text pieces; ``n_predict`` < 0: until it ends or the context is full.

        Afterwards :attr:`finish_reason` is ``stop`` (the model ended), ``length`` or ``interrupted`` (closed early).
        """
        self._text = ""
        self.finish_reason = "interrupted"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        sampler = Sampler(sampling, self.model.n_vocab, self.model.end_tokens if sampling.ignore_eos else ())
        start, evict_s = time.perf_counter(), self._evict_s
        first_token = start
        n = 0
        try:
            while n_predict < 0 or n < n_predict:
                if len(self.tokens[seq]) >= self.n_max:
                    self.finish_reason = "length"
                    break
                token = sampler.sample(self.context.handle)
                if n == 0:
                    first_token = time.perf_counter()
                if self.model.is_end(token):
                    self.finish_reason = "stop"
                    break
                n += 1
                # the token enters the cache before its text is shown, so that an interruption loses neither
                self._decode([token], seq, outputs="last", event=native.EVENT_NONE)
                piece = decoder.decode(self.model.piece(token))
                self._text += piece
                if piece:
                    yield piece
            else:
                self.finish_reason = "length"
            rest = decoder.decode(b"", True)
            if rest:
                self._text += rest
                yield rest
        finally:
            sampler.close()
            self._n_generated += n
            self._decode_s += time.perf_counter() - start - (self._evict_s - evict_s)
            self._ttft_s = self._prefill_s + self._evict_s + (first_token - start)

    #
    # measure
    #

    def held(self, seq: int = 0) -> list[np.ndarray]:
        """Tokens held per attention layer and KV head, int32 ``[n_head_kv]`` each; empty over the stock cache."""
        return self.cache.held(seq) if self.cache is not None else []

    def report(self, seq: int = 0) -> Report:
        """What was measured since the start or the last :meth:`reset`; bytes come from the pools themselves."""
        stats = self.context.stats()
        n_seen = len(self.tokens[seq])
        if self.cache is not None:
            stats.full_bytes += self.cache.bytes_per_token * sum(self._rolled)
        budget = self.budget_tokens(seq)
        tokens = Tokens(prompt=self._n_prompt, generated=self._n_generated)
        if self.cache is not None:
            held = self.cache.seq_stats(seq)
            tokens.held_mean = held.n_slots / held.n_heads
            tokens.held_min, tokens.held_max = int(held.held_min), int(held.held_max)
        else:
            tokens.held_mean = tokens.held_min = tokens.held_max = n_seen
        self._rss.peak_bytes = peak_rss_bytes()
        per_token = stats.full_bytes // n_seen if n_seen else 0
        if self.cache is not None:
            per_token = self.config.storage.bytes_per_token(self.cache)
        return Report(
            text=self._text,
            model=self.model_name,
            policy=self.policy.name,
            policy_args=asdict(self.policy) if is_dataclass(self.policy) and fields(self.policy) else {},
            budget=Budgeted(budget, min(budget / n_seen, 1.0) if n_seen else 1.0, budget * per_token),
            tokens=tokens,
            kv=KV(stats.full_bytes, stats.used_bytes, stats.allocated_bytes, stats.peak_bytes),
            rss=self._rss,
            timing=Timing(
                load_s=self._load_s,
                prefill_s=self._prefill_s,
                prefill_tps=self._n_prefilled / self._prefill_s if self._prefill_s else 0.0,
                ttft_s=self._ttft_s,
                evict_s=self._evict_s,
                decode_s=self._decode_s,
                decode_tps=self._n_generated / self._decode_s if self._decode_s else 0.0,
            ),
            finish_reason=self.finish_reason,
        )
