"""Where an evaluation runs: a text that is read once, and branches of it, each kept in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvlocal.engine.evictor import Bounds, Evictor
from kvlocal.engine.sequence import FEW_TOKENS, Sequence, append, n_common
from kvlocal.measure.variants import Variant
from kvlocal.native.context import Context, ContextConfig
from kvlocal.native.formats import BITS
from kvlocal.native.model import Model


@dataclass(frozen=True)
class StageConfig:
    """How texts are read.

    Attributes:
        n_ctx: tokens of the longest text with everything that follows it.
        parallel: branches that are decoded together.
        n_ubatch: most tokens of one pass, and the steps of exact prefill.
        n_threads: 0: the physical cores.
        kernels: what computes attention over our cache; see :data:`kvlocal.settings.KERNELS`.
        chunk: tokens between two evictions of chunked prefill.
        evict_every: tokens that a branch grows over its budget until it is evicted again.
        n_outputs: most positions of a batch whose logits are read.
    """

    n_ctx: int
    parallel: int = 16
    n_ubatch: int = 512
    n_threads: int = 0
    kernels: Literal["auto", "portable"] = "auto"
    chunk: int = 512
    evict_every: int = 32
    n_outputs: int = 1


@dataclass
class Branch:
    """A text as a variant keeps it.

    Attributes:
        sequence: where it stands; evictor: what keeps it within the variant's budget.
        used_bytes: K and V held after the first eviction, and recalled_bytes, what was recalled since.
        held_mean: tokens per layer and KV head after the eviction.
        full_bytes: what a full f16 cache of the text takes.
        logits: after the last token of the text, float32 ``[n_vocab]``, as it was before that token's eviction.
    """

    sequence: Sequence
    variant: Variant
    evictor: Evictor
    used_bytes: int = 0
    held_mean: float = 0.0
    full_bytes: int = 0
    recalled_bytes: int = 0
    logits: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32), repr=False)

    @property
    def evict_s(self) -> float:
        """Seconds of its evictions and demotions so far."""
        return self.evictor.evict_s


def group(variants: Several[Variant]) -> list[list[Variant]]:
    """Variants that can branch from one reading: by whose cache it is, what it accumulates, and how it stores."""
    groups: dict[object, list[Variant]] = {}
    for variant in variants:
        last = variant.policy.mass == "last"
        store = variant.store
        kind = (variant.rotates, store.bits, store.group) if variant.paged else variant.storage
        groups.setdefault((not variant.paged, last, kind), []).append(variant)
    return list(groups.values())


class Stage:
    """A context for one group of variants; sequence 0 holds the text, the others are branches.

    Use as a context manager.
    """

    def __init__(self, model: Model, variants: Several[Variant], config: StageConfig) -> None:
        self.config = config
        kinds = {v.policy.mass for v in variants} - {"none"}
        self.context = Context(
            model,
            ContextConfig(
                n_ctx=config.n_ctx,
                n_batch=max(2048, config.n_ubatch),
                n_ubatch=config.n_ubatch,
                n_threads=config.n_threads,
                n_seq_max=config.parallel + 1,
                n_outputs=max(config.n_outputs, config.parallel + 1),
                paged=variants[0].paged,
                n_window=max(v.n_window for v in variants),
                mass=next(iter(kinds), "none"),
                formats=tuple(sorted({name for v in variants for name in v.formats})),
                rotate=variants[0].rotates,
                kivi_bits=variants[0].store.bits,
                kivi_group=variants[0].store.group,
                type_kv=variants[0].type_kv,
                portable=variants[0].paged and config.kernels == "portable",
            ),
        )
        self._text = Sequence(self.context, 0)
        self._logits = np.empty(0, np.float32)

    @property
    def text(self) -> list[int]:
        """Tokens of the text that was read."""
        return self._text.tokens

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    #
    # the text
    #

    def read(self, tokens: Several[int]) -> None:
        """Make the text end in exactly ``tokens``; what it already begins with is not read again."""
        common = min(n_common(self.text, tokens), len(tokens) - 1)
        if not self._text.cut(common):
            common = 0
        for i in range(common, len(tokens), self.config.n_ubatch):
            append({self._text: list(tokens[i : i + self.config.n_ubatch])})
        self._logits = self.context.logits()[0]

    #
    # branches
    #

    def branch(self, seq: int, variant: Variant) -> Branch:
        """The text as a variant keeps it, in sequence ``seq``. Chunked prefill reads it once more."""
        tokens = self.text
        bounds = Bounds(
            variant.policy,
            variant.budget,
            variant.store,
            self.config.n_ctx,
            self.config.evict_every,
            variant.retriever,
            variant.archive,
        )
        out = Branch(Sequence(self.context, seq), variant, Evictor(self.context, bounds))
        if variant.chunked:
            self._read_chunked(out, tokens)
        else:
            self._text.branch(out.sequence)
            out.logits = self._logits
            out.evictor.after(out.sequence, "prompt")
            # a policy may come down to its size in several evictions, which an engine would do on the next tokens
            before = math.inf
            while (held := out.evictor.held(out.sequence)) < before and out.evictor.after(out.sequence, "step"):
                before = held
        cache = self.context.cache
        if cache is None:
            out.held_mean = len(tokens)
            out.full_bytes = int(self.context.stats().full_bytes * len(tokens) / max(self._n_cells(), 1))
            out.used_bytes = int(out.full_bytes * BITS[variant.storage][0] / 16)
            return out
        stats = cache.seq_stats(seq)
        out.held_mean = stats.n_slots / stats.n_heads
        out.used_bytes = int(stats.used_bytes)
        # what renumbering took away was read as well
        out.full_bytes = int(stats.full_bytes) + cache.bytes_per_token * (len(tokens) - int(stats.n_seen))
        return out

    def _n_cells(self) -> int:
        """Tokens of all sequences, as the stock cache's statistics count them."""
        return sum(self.context.n_seen(seq) for seq in range(self.config.parallel + 1))

    def _read_chunked(self, branch: Branch, tokens: Several[int]) -> None:
        branch.sequence.release()
        guide = tokens[-branch.variant.guide :] if branch.variant.guide else ()
        for i in range(0, len(tokens), self.config.chunk):
            part = list(tokens[i : i + self.config.chunk])
            append({branch.sequence: part})
            branch.logits = self.context.logits()[0]
            last = i + len(part) == len(tokens)
            branch.evictor.after(branch.sequence, "prompt" if last else "chunk", guide=() if last else guide)

    def extend(
        self,
        branches: Several[Branch],
        tokens: np.ndarray,
        *,
        outputs: Literal["last", "all"] = "last",
        step: int = 0,
        evict: bool = True,
    ) -> np.ndarray:
        """Append ``tokens`` int32 ``[n_branch, n]`` to the branches, row by row, and evict those past their limit.

        ``step``: most tokens per branch and batch (0: as many as fit). Without ``evict`` the branches just grow.

        Returns:
            Logits float32 ``[n_branch, n_vocab]`` of the last token, or ``[n_branch, n, n_vocab]`` of all of them.
        """
        n_branch, n = tokens.shape
        step = min(step or n, max(1, self.context.config.n_batch // n_branch))
        retrieving = [branch for branch in branches if branch.evictor.retrieving] if outputs == "all" else []
        if retrieving:
            step = 1  # every token chooses what the next one reads
        if outputs == "all":
            step = max(1, min(step, self.context.config.n_outputs // n_branch))
        parts = []
        begins = [len(branch.sequence.tokens) for branch in branches]
        for i in range(0, n, step):
            part = tokens[:, i : i + step]
            width = part.shape[1]
            rows = {b.sequence: row.tolist() for b, row in zip(branches, part, strict=True)}
            append(rows, outputs=outputs)
            for branch in retrieving:
                branch.evictor.choose(branch.sequence)
            if outputs == "all":
                parts.append(self.context.logits(n_branch * width).reshape(n_branch, width, -1))
        logits = np.concatenate(parts, axis=1) if parts else self.context.logits(n_branch)
        if outputs == "last" and n > FEW_TOKENS:  # a question
            for row, (branch, begin) in enumerate(zip(branches, begins, strict=True)):
                if branch.evictor.recall(branch.sequence, begin):
                    logits[row] = self.context.logits()[0]
                    assert self.context.cache is not None
                    recalled = int(self.context.cache.seq_stats(branch.sequence.seq).recalled_bytes)
                    branch.used_bytes += recalled - branch.recalled_bytes
                    branch.recalled_bytes = recalled
        for branch in branches if evict else ():
            branch.evictor.after(branch.sequence, "step")
        return logits

    def answer(self, branches: Several[Branch], logits: np.ndarray, n: int) -> list[list[int]]:
        """The likeliest continuations, up to ``n`` tokens each or to the model's end; ``logits`` choose the first."""
        out: list[list[int]] = [[] for _ in branches]
        going = list(range(len(branches)))
        tokens = logits.argmax(axis=1)
        while True:
            alive = [j for j, i in enumerate(going) if not self.context.model.is_end(int(tokens[j]))]
            for j in alive:
                out[going[j]].append(int(tokens[j]))
            alive = [j for j in alive if len(out[going[j]]) < n]
            if not alive:
                return out
            tokens, going = tokens[alive], [going[j] for j in alive]
            logits = self.extend([branches[i] for i in going], tokens[:, None].astype(np.int32))
            tokens = logits.argmax(axis=1)

    def close_branches(self) -> None:
        """Give the memory of all branches back."""
        for seq in range(1, self.config.parallel + 1):
            self.context.truncate(seq, 0)


def open_stages(
    model: Model, groups: Several[Several[Variant]], config: StageConfig, stack: ExitStack
) -> list[tuple[Stage, list[Variant]]]:
    """A stage for every group of variants, closed by ``stack``."""
    return [(stack.enter_context(Stage(model, variants, config)), list(variants)) for variants in groups]
