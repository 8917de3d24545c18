"""Texts continued after an eviction: how far the predictions move from those of the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvlocal.errors import KVError, UsageError
from kvlocal.eval.evaluation import Evaluation
from kvlocal.eval.records import Record, Store, digest, identity, variant_key
from kvlocal.eval.stage import Branch, Stage, StageConfig, group, open_stages
from kvlocal.measure.variants import PAGED, Variant, expand
from kvlocal.native.model import Model

FLOOR_SPLIT = 3 / 4
"""Prefill steps of the run for the noise floor, relative to the first run's."""

FLOOR_STEP = 8
"""Tokens per batch of its continuation: few enough that other kernels compute it."""


Pair = tuple[tuple[Stage, Stage], list[Variant]]
"""Two stages that differ in how they split batches, and their variants; the first of the first pair is the reference:
our own cache with nothing evicted."""


@dataclass(frozen=True)
class Excerpt:
    """Tokens of a text: ``n_context`` that are read and evicted, and the rest, which is continued."""

    id: str
    task: str
    tokens: tuple[int, ...]
    n_context: int


def excerpts(model: Model, paths: Sequence[Path], n_context: int, n_continue: int, per_text: int) -> list[Excerpt]:
    """``per_text`` excerpts of every text, spread evenly over it; each begins with the model's BOS if it has one.

    Raises:
        UsageError: a text is shorter than one excerpt; nothing would be left to read or to continue.
        KVError: a file cannot be read.
    """
    out = []
    for path in paths:
        try:
            tokens = model.tokenize(path.read_text("utf-8"), add_special=False)
        except (OSError, UnicodeDecodeError) as error:
            raise KVError(f"{path} cannot be read as text: {error}.") from error
        bos = model.tokenize("")
        n = n_context - len(bos) + n_continue
        if len(tokens) < n:
            raise UsageError(
                f"{path} has {len(tokens)} tokens; --context {n_context} and --continue {n_continue} need {n}."
            )
        starts = np.linspace(0, len(tokens) - n, per_text, dtype=int)
        for start in dict.fromkeys(starts.tolist()):
            found = (*bos, *tokens[start : start + n])
            out.append(Excerpt(f"{path.stem}:{start}", path.stem, found, n_context))
    return out


@dataclass(frozen=True)
class Distribution:
    """Log-probabilities over the vocabulary at some positions, float64 ``[n, n_vocab]``."""

    log_p: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Distribution:
        x = logits.astype(np.float64)
        x -= x.max(axis=-1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
        return cls(x)

    def nll(self, tokens: np.ndarray) -> float:
        """Mean negative log-likelihood of the tokens that come next, nats."""
        return float(-self.log_p[np.arange(len(tokens)), tokens].mean())

    def kl(self, other: Distribution) -> float:
        """Mean KL(self || other), nats."""
        return float((np.exp(self.log_p) * (self.log_p - other.log_p)).sum(axis=-1).mean())

    def top1(self, other: Distribution) -> float:
        """Share of positions where both have the same likeliest token."""
        return float((self.log_p.argmax(-1) == other.log_p.argmax(-1)).mean())


class Kld(Evaluation[Excerpt, Variant]):
    """KL divergence, top-1 agreement and perplexity ratio against the same cache with nothing evicted.

    The continuation is decoded in the same batches by all of them. Beside every figure stands its noise floor: the same
    variant once more with other batches, and so with other kernels, compared with itself.
    """

    def __init__(
        self, model: Model, found: Sequence[Excerpt], variants: Sequence[Variant], config: StageConfig, store: Store
    ) -> None:
        super().__init__(found, variants, store)
        self.model = model
        splits = (config.n_ubatch, int(config.n_ubatch * FLOOR_SPLIT))
        self.configs = [replace(config, n_ubatch=n, n_outputs=n, parallel=1) for n in splits]

    def key(self, unit: Excerpt, want: Variant) -> str:
        return digest("kld", unit.id, unit.tokens, unit.n_context, variant_key(want))

    def open(self, stack: ExitStack) -> None:
        groups = group([*expand([PAGED], {}, []), *self.wants])
        a, b = (open_stages(self.model, groups, config, stack) for config in self.configs)
        self._pairs: list[Pair] = [((x, y), variants) for (x, variants), (y, _) in zip(a, b, strict=True)]

    def measure(self, unit: Excerpt, missing: Sequence[Variant]) -> Iterator[tuple[int, str]]:
        context, rest = list(unit.tokens[: unit.n_context]), np.array(unit.tokens[unit.n_context :])
        reference: Distribution | None = None
        done = 0
        for pair, variants in self._pairs:
            wanted = [v for v in missing if v in variants]
            if not wanted and reference is not None:
                continue
            for stage in pair:
                stage.read(context)
            if reference is None:
                reference = self._continue(pair[0], variants[0], rest)[1]
            for variant in wanted:
                yield done, f"{unit.id} {variant.label}"
                done += 1
                branch, got = self._continue(pair[0], variant, rest)
                _, again = self._continue(pair[1], variant, rest, FLOOR_STEP)
                nll, full = got.nll(rest[1:]), reference.nll(rest[1:])
                measures = {
                    "kl": reference.kl(got),
                    "floor": got.kl(again),
                    "top1": reference.top1(got),
                    "ppl": float(np.exp(nll)),
                    "ppl_ratio": float(np.exp(nll - full)),
                }
                self.store.put(self.key(unit, variant), record("kld", unit, branch, measures))

    def _continue(self, stage: Stage, variant: Variant, rest: np.ndarray, step: int = 0) -> tuple[Branch, Distribution]:
        branch = stage.branch(1, variant)
        logits = stage.extend([branch], rest[None, :-1].astype(np.int32), outputs="all", step=step, evict=False)
        stage.close_branches()
        return branch, Distribution.of(logits[0])


class Ppl(Evaluation[Excerpt, Variant]):
    """Perplexity of a long continuation during which the cache is evicted again and again.

    The text goes on in batches of ``evict_every`` tokens, each followed by an eviction if one is due.
    """

    def __init__(
        self, model: Model, found: Sequence[Excerpt], variants: Sequence[Variant], config: StageConfig, store: Store
    ) -> None:
        super().__init__(found, variants, store)
        self.model = model
        self.config = replace(config, n_outputs=config.evict_every * config.parallel)

    def key(self, unit: Excerpt, want: Variant) -> str:
        return digest("ppl", unit.id, unit.tokens, unit.n_context, variant_key(want))

    def open(self, stack: ExitStack) -> None:
        groups = group([*expand([PAGED], {}, []), *self.wants])
        self._stages = open_stages(self.model, groups, self.config, stack)

    def measure(self, unit: Excerpt, missing: Sequence[Variant]) -> Iterator[tuple[int, str]]:
        context, rest = list(unit.tokens[: unit.n_context]), np.array(unit.tokens[unit.n_context :])
        full, done = 0.0, 0
        for n, (stage, variants) in enumerate(self._stages):
            wanted = [v for v in missing if v in variants]
            todo = list(dict.fromkeys([variants[0], *wanted])) if n == 0 else wanted
            if todo:
                stage.read(context)
            for i in range(0, len(todo), self.config.parallel):
                yield done, unit.id
                branches, nll, held = self._continue(stage, todo[i : i + self.config.parallel], rest)
                full = nll[0] if n == i == 0 else full
                for branch, own, (used, mean) in zip(branches, nll, held, strict=True):
                    measures = {"ppl": float(np.exp(own)), "ppl_ratio": float(np.exp(own - full))}
                    branch.used_bytes, branch.held_mean = int(used), float(mean)
                    if branch.variant in wanted:
                        self.store.put(self.key(unit, branch.variant), record("ppl", unit, branch, measures))
                        done += 1
                stage.close_branches()

    def _continue(
        self, stage: Stage, variants: Sequence[Variant], rest: np.ndarray
    ) -> tuple[list[Branch], np.ndarray, np.ndarray]:
        """Branches, mean negative log-likelihoods ``[n]``, and mean bytes and tokens held ``[n, 2]``."""
        branches = [stage.branch(seq, variant) for seq, variant in enumerate(variants, start=1)]
        nll = np.zeros(len(branches))
        held = []
        every = self.config.evict_every
        for i in range(0, len(rest) - 1, every):
            part = rest[i : min(i + every, len(rest) - 1)]
            targets = rest[i + 1 : i + 1 + len(part)]
            tokens = np.tile(part.astype(np.int32), (len(branches), 1))
            logits = stage.extend(branches, tokens, outputs="all")
            for j, own in enumerate(logits):
                nll[j] += Distribution.of(own).nll(targets) * len(part)
            held.append([self._held(stage, branch) for branch in branches])
        per_token = branches[0].full_bytes / len(stage.text)
        ends = [min(i + every, len(rest) - 1) for i in range(0, len(rest) - 1, every)]
        for branch in branches:
            branch.full_bytes = int(per_token * (len(stage.text) + np.mean(ends)))
        return branches, nll / (len(rest) - 1), np.mean(held, axis=0)

    def _held(self, stage: Stage, branch: Branch) -> tuple[float, float]:
        cache = stage.context.cache
        if cache is None:
            n = len(branch.sequence.tokens)
            return branch.full_bytes / len(stage.text) * n, n
        stats = cache.seq_stats(branch.sequence.seq)
        return stats.used_bytes, stats.n_slots / stats.n_heads


def record(metric: str, excerpt: Excerpt, branch: Branch, measures: dict[str, float]) -> Record:
    """The record of an excerpt."""
    return Record(
        metric=metric,
        task=excerpt.task,
        case=excerpt.id,
        question="",
        held_mean=branch.held_mean,
        used_bytes=branch.used_bytes,
        full_bytes=branch.full_bytes,
        evict_s=branch.evict_s,
        measures=measures,
        **identity(branch.variant),
    )
