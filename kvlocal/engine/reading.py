"""How prompts are read into sequences: whether they fit, in which pieces, and what is evicted meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from kvlocal.engine.config import EngineConfig, check_chunk, chunk_fits
from kvlocal.engine.evictor import Evictor
from kvlocal.engine.hints import prompt_hint
from kvlocal.engine.sequence import Sequence, append, n_common
from kvlocal.errors import ContextFullError, UsageError
from kvlocal.native.context import Context

Mode = Literal["exact", "chunked", "whole"]
"""How a prompt is read: evicted at its end, after every chunk, or not at all."""


class Reader:
    """Reads prompts into the sequences of one context, as its settings say."""

    def __init__(self, context: Context, config: EngineConfig, evictor: Evictor, n_ctx: int) -> None:
        self.context = context
        self.config = config
        self.evictor = evictor
        self.n_ctx = n_ctx

    @property
    def n_max(self) -> int:
        """Most tokens of a sequence: the cache bounds those that keep everything, positions those that do not roll."""
        if self.evictor.evicts and self.config.policy.rolls:
            return 2**31 - 1
        return max(self.n_ctx, self.context.model.n_ctx_train) if self.evictor.evicts else self.n_ctx

    def chunks(self, mode: Mode | None = None) -> bool:
        """Whether a prompt is evicted after every chunk; ``mode``: another one than that of the settings."""
        return self.evictor.evicts and (mode or self.config.prefill) == "chunked"

    def fits(self, n: int, sequence: Sequence) -> bool:
        """Whether a prompt of ``n`` tokens can be read whole after what a sequence holds (or nothing else is left)."""
        return not self.evictor.evicts or self.evictor.held(sequence) + n < self.n_ctx

    def extend(self, sequence: Sequence, tokens: list[int], mode: Mode | None = None) -> tuple[list[int], bool]:
        """Prepare a sequence to end in exactly ``tokens``: what it does not share with them is cut off.

        Returns:
            The tokens that are to be read, none if their logits are known; and whether all of them are, because the
            change lies in what was evicted.

        Raises:
            UsageError: they do not fit; nothing has changed.
        """
        have = sequence.tokens
        if have == tokens and sequence.last_logits() is not None:
            return [], False
        common = min(n_common(have, tokens), len(tokens) - 1)  # the last token must be computed to have logits
        reached = sequence.reach(common)
        reread = common < len(have) and reached == 0
        common = reached if common < len(have) else common
        if common < len(have):
            self.check(len(tokens) - common, sequence, common, chunked=self.chunks(mode))
            reread |= not sequence.cut(common) and common > 0
        return tokens[len(sequence.tokens) :], reread

    def read(self, sequence: Sequence, tokens: list[int], mode: Mode | None = None) -> Generator[int]:
        """Append a prompt, piece by piece; yields how many tokens have been read. Evicts at its end (``exact``) or
        after every chunk (``chunked``). Closed before it has ended, it takes back what it read.

        Raises:
            UsageError: the prompt is empty or longer than the context; nothing has changed then.
            KVError: the cache is full; the sequence is as before.
        """
        chunked, config = self.chunks(mode), self.config
        if chunked:
            check_chunk(config, self.n_ctx)
        self._make_room(len(tokens), sequence, chunked)
        self.check(len(tokens), sequence, len(sequence.tokens), chunked=chunked)
        # one pass through the graph at a time: progress is seen, and an interruption is heard, in between
        step = min(config.chunk if chunked else config.n_ubatch, config.n_batch)
        room = self.n_ctx - config.chunk - config.guide
        begin = len(sequence.tokens)
        sequence.read_all()
        sequence.mark(logits=False)  # a sequence that is interrupted goes back to here
        try:
            # what an archive recalls for is the last piece, which is a whole one then
            first = len(tokens) % step if self.evictor.archives else 0
            ends = [*range(first or step, len(tokens), step), len(tokens)]
            for i, end in zip([0, *ends[:-1]], ends, strict=True):
                part, last = tokens[i:end], end == len(tokens)
                append({sequence: part}, outputs="last" if last else "none")
                if mode == "whole":
                    sequence.look_at = None
                elif last:
                    self.evictor.recall(sequence, begin)
                    self.evictor.after(sequence, "prompt")
                elif chunked:
                    guide = tokens[-config.guide :] if config.guide else ()
                    self.evictor.after(sequence, "chunk", room=room, guide=guide)
                yield end
        except BaseException:
            if not self.context.closed:
                sequence.cut(begin)
            raise

    def _make_room(self, n: int, sequence: Sequence, chunked: bool) -> None:
        """A prompt that is read whole, after what is already there, may need an eviction before it."""
        room = self.n_ctx - n - 1
        fits = len(sequence.tokens) + n < self.n_max and room >= self.config.policy.min_budget
        if self.evictor.evicts and not chunked and fits and self.evictor.held(sequence) > room:
            self.evictor.after(sequence, "prompt", room=room)

    def check(self, n: int, sequence: Sequence, n_before: int, *, chunked: bool) -> None:
        """Positions must stay below :attr:`n_max`; a prompt that is read whole must also fit into the cache.

        ``n_before`` tokens of the sequence stay before it.

        Raises:
            UsageError: it is empty or does not fit.
        """
        if n == 0:
            raise UsageError("The prompt is empty; give some text.")
        room = self.n_max - n_before
        if not chunked:
            held = self.evictor.held(sequence) - (len(sequence.tokens) - n_before)
            room = min(room, self.n_ctx - max(held, 0))
        if n < room:
            return
        hint = prompt_hint(
            n_before + n,
            n_ctx=self.n_ctx,
            n_ctx_train=self.context.model.n_ctx_train,
            chunked=chunked,
            policy_evicts=self.config.policy.evicts,
            keeps_all=self.config.budget.keeps_all,
            chunk_fits=chunk_fits(self.config, self.n_ctx),
        )
        before = f" after the {n_before} already read" if n_before else ""
        raise ContextFullError(
            f"The prompt has {n} tokens, the context has room for {max(room - 1, 0)}{before}; {hint}."
        )
