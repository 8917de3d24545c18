"""The sequences of a context: what was read into them, in which order, and how to take it back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from kvlocal.engine.config import EngineConfig, check_chunk
from kvlocal.engine.keeper import Keeper
from kvlocal.engine.report import Timing
from kvlocal.errors import ContextFullError, EvictionError, KVError, UsageError
from kvlocal.native import library
from kvlocal.native.cache import PagedCache
from kvlocal.native.context import Context
from kvlocal.native.model import Model
from kvlocal.policies.parts.policy import Policy

Progress = Callable[[int, int], None]
Mode = Literal["exact", "chunked", "whole"]
"""How a prompt is read: evicted at its end, after every chunk, or not at all."""


class Sequences:
    """The ledger of tokens and positions; :class:`kvlocal.engine.engine.Engine` opens and closes what it stands on."""

    model: Model
    config: EngineConfig
    context: Context
    cache: PagedCache | None
    keeper: Keeper
    n_ctx: int
    timing: Timing
    _hook_errors: list[BaseException]
    _hook_seq: int = 0  # the sequence of the last event

    def forget(self) -> None:
        """All sequences are empty, and nothing of them was measured."""
        for seq in range(self.config.n_seq_max):
            self.context.truncate(seq, 0)
        self.tokens: list[list[int]] = [[] for _ in range(self.config.n_seq_max)]  # all that was read, per sequence
        self.owner: object = None  # whose text sequence 0 holds
        self.keeper.reset()
        self._kept_logits: np.ndarray | None = None  # instead of those of the last step
        self._has_logits = False  # of the last token of sequence 0
        self._n_prompt = self._n_prefilled = 0

    @property
    def n_max(self) -> int:
        """Most tokens of a sequence: the cache bounds those that keep everything, positions those that do not roll."""
        if self._bounded and self.policy.rolls:
            return 2**31 - 1
        return max(self.n_ctx, self.model.n_ctx_train) if self._bounded else self.n_ctx

    @property
    def policy(self) -> Policy:
        return self.config.policy

    @property
    def _bounded(self) -> bool:
        return self.keeper.bounded

    def _chunks(self, mode: str | None = None) -> bool:
        return self._bounded and (mode or self.config.prefill) == "chunked"

    #
    # read
    #

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        seq: int = 0,
        on_progress: Progress | None = None,
        mode: Mode | None = None,
    ) -> None:
        """Append a prompt to a sequence and evict at its end (``exact``) or after every chunk (``chunked``).

        ``mode``: another one than that of the settings.

        Raises:
            UsageError: the prompt is empty or longer than the context; nothing has changed then.
            KVError: the cache is full; the sequence is as before.
        """
        chunked = self._chunks(mode)
        if chunked:
            check_chunk(self.config, self.n_ctx)
        self._make_room(len(tokens), seq, chunked)
        self._check_prompt(len(tokens), seq, len(self.tokens[seq]), chunked)
        # one pass through the graph at a time: progress is seen, and an interruption is heard, in between
        step = min(self.config.chunk if chunked else self.config.n_ubatch, self.config.n_batch)
        start, evict_s = time.perf_counter(), self.keeper.evict_s
        begin = len(self.tokens[seq])
        try:
            for i in range(0, len(tokens), step):
                part = tokens[i : i + step]
                last = i + len(part) == len(tokens)
                event = library.EVENT_PROMPT if last else library.EVENT_CHUNK
                if mode == "whole" or not (chunked or last):
                    event = library.EVENT_NONE
                    self.keeper.set_limit(seq, 0)  # an exact prompt is seen whole, whatever the budget
                guide = tokens[-self.config.guide :] if chunked and self.config.guide and not last else ()
                if guide:
                    event = library.EVENT_NONE  # the eviction follows below
                    self.keeper.set_limit(seq, 0)
                self._decode(part, seq, outputs="last" if last else "none", event=event)
                if guide:
                    self.keeper.evict(seq, room=self.keeper.chunk_room, guide=guide)
                if on_progress:
                    on_progress(i + len(part), len(tokens))
        except BaseException:
            self.cut(begin, seq=seq)
            raise
        self._n_prompt += len(tokens)
        self._n_prefilled += len(tokens)
        self.timing.prefill_s += time.perf_counter() - start - (self.keeper.evict_s - evict_s)

    def _make_room(self, n: int, seq: int, chunked: bool) -> None:
        """A prompt that is read whole, after what is already there, may need an eviction before it."""
        room = self.n_ctx - n - 1
        fits = len(self.tokens[seq]) + n < self.n_max and room >= self.policy.min_budget
        if self._bounded and not chunked and fits and self.keeper.held(seq, len(self.tokens[seq])) > room:
            self.keeper.evict(seq, room=room)

    def fits(self, n: int, seq: int = 0) -> bool:
        """Whether a prompt of ``n`` tokens can be read whole after what a sequence holds (or nothing else is left)."""
        return not self._bounded or self.keeper.held(seq, len(self.tokens[seq])) + n < self.n_ctx

    def _check_prompt(self, n: int, seq: int, n_seen: int, chunked: bool) -> None:
        """Positions must stay below ``n_max``; a prompt that is read whole must also fit into the cache.

        ``n_seen`` tokens of the sequence stay before it.
        """
        if n == 0:
            raise UsageError("The prompt is empty; give some text.")
        room = self.n_max - n_seen
        if not chunked:
            held = self.keeper.held(seq, len(self.tokens[seq])) - (len(self.tokens[seq]) - n_seen)
            room = min(room, self.n_ctx - max(held, 0))
        if n < room:
            return
        if chunked:
            hint = f"the model was trained for {self.model.n_ctx_train}; to go beyond, use a larger context (-c)"
        elif self.policy.evicts:
            hint = "use --prefill chunked, which needs room only for the budget, or a larger context (-c)"
        else:
            hint = "use a larger context (-c), or a policy that evicts with --prefill chunked"
        before = f" after the {n_seen} already read" if n_seen else ""
        raise ContextFullError(
            f"The prompt has {n} tokens, the context has room for {max(room - 1, 0)}{before}; {hint}."
        )

    def _decode(self, tokens: Sequence[int], seq: int, *, outputs: Literal["last", "none"], event: int) -> None:
        self._hook_errors.clear()
        self._kept_logits, self._has_logits = None, seq == 0 and outputs == "last"
        try:
            self.context.decode(tokens, self.context.n_seen(seq), seq, outputs=outputs, event=event)
        except KVError:
            if self._hook_errors:
                # the step was computed and is in the cache; only the eviction after it failed
                self.tokens[seq].extend(tokens)
                raise self._hook_errors[0] from None
            raise
        self.tokens[seq].extend(tokens)

    def cut(self, n: int, *, seq: int = 0) -> bool:
        """Cut a sequence back to its first ``n`` tokens; one that was evicted since then becomes empty.

        Returns:
            ``False`` if it did.
        """
        self._kept_logits, self._has_logits = None, False
        possible = self.keeper.evicted_at(seq) <= n <= len(self.tokens[seq])
        if not possible:
            n = self.keeper.rolled[seq] = 0
        self.context.truncate(seq, n - self.keeper.rolled[seq])
        del self.tokens[seq][n:]
        return possible

    def extend(
        self,
        tokens: Sequence[int],
        *,
        seq: int = 0,
        on_progress: Progress | None = None,
        mode: Mode | None = None,
    ) -> bool:
        """Make a sequence end in exactly ``tokens``, reading only what is new; ``mode`` as for :meth:`prefill`.

        Returns:
            Whether it had to be read again from the beginning, because the change lies in what was evicted.
        """
        have = self.tokens[seq]
        if seq == 0 and have == tokens and self.last_logits() is not None:
            return False
        common = 0
        for ours, theirs in zip(have, tokens, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(tokens) - 1)  # the last token must be computed to have logits
        reread = common < len(have) and common < self.keeper.evicted_at(seq)
        common = 0 if reread else common
        if common < len(have):
            self._check_prompt(len(tokens) - common, seq, common, self._chunks(mode))
            self.cut(common, seq=seq)
        self.prefill(tokens[len(self.tokens[seq]) :], seq=seq, on_progress=on_progress, mode=mode)
        return reread

    #
    # several of them
    #

    def branch(self, src: int, dst: int) -> None:
        """Make ``dst`` a copy of ``src``; their pages are shared until one of them writes."""
        self.context.branch(src, dst)
        self.tokens[dst] = list(self.tokens[src])
        self.keeper.rolled[dst] = self.keeper.rolled[src]

    def release(self, seq: int) -> None:
        """Empty a sequence."""
        self.context.truncate(seq, 0)
        self.tokens[seq] = []
        self.keeper.rolled[seq] = 0

    def last_logits(self) -> np.ndarray | None:
        """After the last token of sequence 0, float32 ``[n_vocab]``, if they are known."""
        if self._kept_logits is not None:
            return self._kept_logits
        return self.context.logits()[0] if self._has_logits else None

    def keep_logits(self, logits: np.ndarray | None) -> None:
        """What :meth:`generate` begins with: :meth:`last_logits` of the time when the sequence was as it is now."""
        self._kept_logits = logits

    def restore(
        self, saved: bytes, tokens: Sequence[int], *, rolled: int, evicted_at: int, logits: np.ndarray | None
    ) -> None:
        """Put a saved cache in the place of sequence 0; see :mod:`kvlocal.engine.session`.

        Raises:
            KVError: it does not fit or is damaged; the sequence is as before, or empty.
        """
        try:
            self.context.restore(0, saved)
        except KVError:
            if self.context.n_seen(0) == 0:
                self.release(0)
            raise
        if self.context.n_seen(0) + rolled != len(tokens):
            self.release(0)
            raise KVError(f"The saved cache has seen {self.context.n_seen(0)} tokens, its text has {len(tokens)}.")
        self.tokens[0] = list(tokens)
        self.keeper.rolled[0] = rolled
        if self.cache is not None:
            self.cache.note_eviction(0, evicted_at)
        self.keeper.watch(0)
        self._has_logits = False
        self.keep_logits(logits)

    def step(self, tokens: Mapping[int, int]) -> None:
        """Decode one more token of several sequences together, ``{seq: token}``; evicts those past their limit.

        The i-th of them has the i-th logits of the context afterwards.

        Raises:
            EvictionError: an eviction failed, after the step had been computed for all of them.
            KVError: the cache is full.
        """
        self._hook_errors.clear()
        self._kept_logits, self._has_logits = None, False
        seqs = np.fromiter(tokens, np.int32)
        pos = np.array([self.context.n_seen(int(seq)) for seq in seqs], np.int32)
        try:
            self.context.decode(list(tokens.values()), pos, seqs)
        except KVError:
            if not self._hook_errors:
                raise
        for seq, token in tokens.items():
            self.tokens[seq].append(token)
        if self._hook_errors:
            raise EvictionError(str(self._hook_errors[0]), self._hook_seq)
