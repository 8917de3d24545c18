"""Model, cache and policy together: knows when to prefill, evict, decode and evict again."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace

import numpy as np
import psutil

from kvlocal.engine.config import EngineConfig, check_chunk, context_config
from kvlocal.engine.keeper import Keeper
from kvlocal.engine.report import KV, Budgeted, Report, Timing, Tokens, peak_rss_bytes
from kvlocal.engine.sequences import Mode, Progress, Sequences
from kvlocal.native import library
from kvlocal.native.context import Context
from kvlocal.native.model import Model
from kvlocal.native.sampling import Sampler, Sampling
from kvlocal.policies.parts.policy import Policy
from kvlocal.storage.budget import Budget

__all__ = ["Engine", "EngineConfig", "Mode", "Progress"]


class Engine(Sequences):
    """One model and its cache. Use as a context manager, or :meth:`close` it.

    Raises:
        UsageError: the model's architecture or the settings cannot be served.
        KVError: the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig, model: Model | None = None) -> None:
        """``model``: loaded already; it belongs to the engine then."""
        start = time.perf_counter()
        self.model = model or Model(config.model, n_gpu_layers=config.n_gpu_layers)
        try:
            self._open(config)
        except BaseException:
            self._unload()
            raise
        self.timing = Timing(load_s=time.perf_counter() - start)
        self.reset()

    def _open(self, config: EngineConfig) -> None:
        self.n_ctx = config.n_ctx or self.model.n_ctx_train
        if config.prefill == "chunked" and config.policy.evicts and not config.budget.keeps_all:
            check_chunk(config, self.n_ctx)
        self.context = Context(self.model, context_config(self.model, config, self.n_ctx))
        self.cache = self.context.cache
        try:
            self._check(config)
        except BaseException:
            self.context.close()
            raise
        self.config = config
        self.keeper = Keeper(self.context, config, self.n_ctx)
        self._hook_errors: list[BaseException] = []
        if self.cache is not None:
            self.context.set_evict_hook(library.evict_hook(self._on_event, self._hook_errors))

    def _on_event(self, seq: int, event: int) -> None:
        self._hook_seq = seq
        self.keeper.on_event(seq, event)

    def _unload(self) -> None:
        self.model.close()

    def _memory_bytes(self) -> int | None:
        """What a budget must not exceed, ``None``: anything goes."""
        return int(psutil.virtual_memory().total)

    def _check(self, config: EngineConfig) -> None:
        if self.cache is not None:
            config.storage.check(config.budget, self.cache, config.policy, self.n_ctx, self._memory_bytes())

    def close(self) -> None:
        self.context.close()
        self._unload()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget all sequences and measurements; the model stays loaded."""
        self.forget()
        if self.cache is not None:
            self.cache.reset_peak()
        self.finish_reason: str | None = None
        self._text = ""
        self._n_generated = 0
        self.timing = Timing(load_s=self.timing.load_s)

    @property
    def model_name(self) -> str:
        return self.model.name

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return self.model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return self.model.chat_tokens(messages)

    #
    # eviction
    #

    def budget_tokens(self, seq: int = 0) -> int:
        """The budget of a sequence now, tokens per head and layer on average."""
        return self.keeper.budget_tokens(seq)

    def evict(self, seq: int = 0) -> bool:
        """Bring a sequence down to its budget; ``False`` if it already holds no more."""
        return self.keeper.evict(seq)

    def change(self, *, policy: Policy | None = None, budget: Budget | None = None) -> bool:
        """Another policy or budget from now on: what is held is brought down to it at the next eviction.

        Returns:
            Whether the cache had to be made anew: sequences are empty then, their text must be read again.

        Raises:
            UsageError: they do not fit each other, the model or the context; the settings are as before then.
        """
        old = self.config
        config = replace(old, policy=policy or old.policy, budget=budget or old.budget)
        wanted = context_config(self.model, config, self.n_ctx)
        self._check(config)
        # slots that are renumbered must be f16, and as many in every head
        renumbers = config.policy.rolls and not old.policy.rolls
        if self.context.config.serves(wanted) and not renumbers:
            self.config = self.keeper.config = config
            for seq in range(config.n_seq_max):
                self.keeper.watch(seq)
            return False
        self.context.close()
        try:
            self._open(config)
        except BaseException:
            self._open(old)
            raise
        finally:
            self.reset()
        return True

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
        start, evict_s = time.perf_counter(), self.keeper.evict_s
        first_token = start
        n = 0
        try:
            while n_predict < 0 or n < n_predict:
                if len(self.tokens[seq]) >= self.n_max:
                    self.finish_reason = "length"
                    break
                kept = self._kept_logits
                token = sampler.sample(self.context.handle) if kept is None else sampler.sample_from(kept)
                if n == 0:
                    first_token = time.perf_counter()
                if self.model.is_end(token):
                    self.finish_reason = "stop"
                    break
                n += 1
                # the token enters the cache before its text is shown, so that an interruption loses neither
                self._decode([token], seq, outputs="last", event=library.EVENT_NONE)
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
            self.timing.decode_s += time.perf_counter() - start - (self.keeper.evict_s - evict_s)
            self.timing.ttft_s = self.timing.prefill_s + self.keeper.evict_s + (first_token - start)

    #
    # measure
    #

    def held(self, seq: int = 0) -> list[np.ndarray]:
        """Tokens held per attention layer and KV head, int32 ``[n_head_kv]`` each; empty over the stock cache."""
        return self.cache.held(seq) if self.cache is not None else []

    def kv(self, seq: int) -> dict[str, float]:
        """What one sequence holds: ``held_mean`` tokens per layer and KV head, ``used_bytes``, and ``full_bytes`` of a
        full f16 cache."""
        n = len(self.tokens[seq])
        if self.cache is None:
            full = int(self.context.stats().allocated_bytes) * n // self.context.n_cells
            return {"held_mean": n, "used_bytes": full, "full_bytes": full}
        stats = self.cache.seq_stats(seq)
        full = self.cache.bytes_per_token * n
        return {"held_mean": stats.n_slots / stats.n_heads, "used_bytes": int(stats.used_bytes), "full_bytes": full}

    def report(self, seq: int = 0) -> Report:
        """What was measured since the start or the last :meth:`reset`; bytes come from the pools themselves."""
        stats, cache = self.context.stats(), self.cache
        n_seen, budget = len(self.tokens[seq]), self.budget_tokens(seq)
        tokens = Tokens(self._n_prompt, self._n_generated, n_seen, n_seen, n_seen)
        per_token = stats.full_bytes // n_seen if n_seen else 0
        if cache is not None:
            stats.full_bytes += cache.bytes_per_token * sum(self.keeper.rolled)
            held = cache.seq_stats(seq)
            tokens.held_mean = held.n_slots / held.n_heads
            tokens.held_min, tokens.held_max = int(held.held_min), int(held.held_max)
            per_token = self.config.storage.bytes_per_token(cache)
        self.keeper.rss.peak_bytes = peak_rss_bytes()
        timing = self.timing
        timing.evict_s = self.keeper.evict_s
        timing.prefill_tps = self._n_prefilled / timing.prefill_s if timing.prefill_s else 0.0
        timing.decode_tps = self._n_generated / timing.decode_s if timing.decode_s else 0.0
        return Report(
            text=self._text,
            model=self.model_name,
            policy=self.policy.name,
            policy_args=asdict(self.policy) if is_dataclass(self.policy) and fields(self.policy) else {},
            budget=Budgeted(budget, min(budget / n_seen, 1.0) if n_seen else 1.0, budget * per_token),
            tokens=tokens,
            kv=KV(stats.full_bytes, stats.used_bytes, stats.allocated_bytes, stats.peak_bytes),
            rss=self.keeper.rss,
            timing=replace(timing),
            finish_reason=self.finish_reason,
        )
