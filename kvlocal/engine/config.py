"""What an engine is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvlocal import settings
from kvlocal.errors import UsageError
from kvlocal.native.context import ContextConfig
from kvlocal.native.model import Model
from kvlocal.policies.parts.policy import Policy
from kvlocal.retrieval.retriever import Retriever
from kvlocal.setting import MAX_INT, MAX_SEQUENCES, refusal
from kvlocal.storage.archive import ASKING, Archive
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

CHECKED = (
    *(settings.N_CTX, settings.N_BATCH, settings.N_UBATCH, settings.N_THREADS, settings.N_GPU_LAYERS),
    *(settings.KERNELS, settings.PREFILL, settings.CHUNK, settings.GUIDE, settings.EVICT_EVERY),
)
"""The settings whose values an engine takes as they are."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is made of.

    Attributes:
        model: path of a GGUF file.
        policy: which tokens are kept; one with ``evicts = False`` runs on llama.cpp's own cache.
        budget: how many.
        retriever: which of those a token reads, ``None``: all. Runs on our cache, whatever the policy.
        archive: what keeps on disk what memory may lose, ``None``: nothing. Likewise.
        n_ctx: tokens the cache has room for (0: what the model was trained for, or less if memory is short).
        n_batch: most tokens given to llama.cpp at once; n_ubatch: most in one pass.
        n_threads: 0: the physical cores; see :func:`kvlocal.native.threads.default_threads`.
        n_gpu_layers: layers on the accelerator.
        kv_swa: how sliding windows are stored.
        kernels: what computes attention over our cache; see :data:`kvlocal.settings.KERNELS`.
        prefill: ``exact`` evicts once, at the end of the prompt; ``chunked`` after every ``chunk`` tokens, so that
            memory stays below budget + chunk whatever the length.
        chunk: tokens per chunk.
        storage: how what is kept is stored. Any but f16 runs on our cache, whatever the policy.
        guide: of a chunked prompt, this many tokens at its end are read after every chunk as if they came next, and
            their attention decides what that chunk's eviction keeps (0: the chunk's own end does).
        evict_every: tokens per head that a sequence grows over its budget while decoding until it is evicted again; 1
            is the papers' exact form.
        n_seq_max: sequences the cache can hold.
        n_pool: tokens of all sequences together that llama.cpp's own cache has room for (0 = ``n_ctx``).
        n_outputs: most positions of a batch whose logits are read (evaluation).
    """

    model: Path
    policy: Policy
    budget: Budget
    n_ctx: int = settings.N_CTX.default
    n_batch: int = settings.N_BATCH.default
    n_ubatch: int = settings.N_UBATCH.default
    n_threads: int = settings.N_THREADS.default
    n_gpu_layers: int = settings.N_GPU_LAYERS.default
    kv_swa: Literal["f16", "q8"] = settings.KV_SWA.default
    kernels: Literal["auto", "portable"] = settings.KERNELS.default
    prefill: Literal["exact", "chunked"] = settings.PREFILL.default
    chunk: int = settings.CHUNK.default
    guide: int = settings.GUIDE.default
    storage: Storage = field(default_factory=Storage)
    evict_every: int = settings.EVICT_EVERY.default
    n_seq_max: int = 1
    n_pool: int = 0
    n_outputs: int = 0
    retriever: Retriever | None = None
    archive: Archive | None = None

    def __post_init__(self) -> None:
        for setting in CHECKED:
            object.__setattr__(self, setting.name, setting.check(getattr(self, setting.name)))
        for name, low, high in (
            ("n_seq_max", 1, MAX_SEQUENCES),
            ("n_pool", 0, MAX_INT),
            ("n_outputs", 0, MAX_INT),
        ):
            if not low <= getattr(self, name) <= high:
                raise refusal(name, getattr(self, name), f"a whole number from {low} to {high}")
        if self.guide and self.prefill != "chunked":
            raise UsageError("A guide has no effect on an exact prefill; give --prefill chunked as well.")
        if self.guide and "scores" not in self.policy.needs:
            raise UsageError(f"Policy {self.policy.name} does not look at attention scores, so it cannot be guided.")
        if self.policy.rolls and self.storage.demotes:
            raise UsageError(
                f"Policy {self.policy.name} renumbers what it keeps, which has to be stored in f16 for that; leave out "
                f"the storage {self.storage.name}, or positions=rolled."
            )
        if self.policy.formats and self.storage.demotes:
            raise UsageError(
                f"Policy {self.policy.name} says itself how tokens are stored; leave out the storage "
                f"{self.storage.name}, or give the policy its rungs."
            )
        if self.policy.rolls and self.retriever:
            raise UsageError(
                f"Policy {self.policy.name} renumbers what it keeps, so that no part of it can be retrieved; leave out "
                f"--retrieve {self.retriever.name}, or positions=rolled."
            )
        if self.archive:
            self._check_archive(self.archive)
        check_kernels(self.kernels, self.policy, self.storage)

    @property
    def paged(self) -> bool:
        """Whether it runs on our cache; else on llama.cpp's own."""
        return self.policy.evicts or self.storage.demotes or bool(self.retriever or self.archive)

    @property
    def recalled(self) -> int:
        """Tokens per head that an archive may bring back beside what is held."""
        if self.archive is None or self.archive.recall == "off":
            return 0
        return self.retriever.budget if self.retriever else self.archive.budget

    def _check_archive(self, archive: Archive) -> None:
        if self.policy.rolls:
            raise UsageError(
                f"Policy {self.policy.name} renumbers what it keeps, so that nothing can be recalled beside it; leave "
                "out --archive, or positions=rolled."
            )
        if archive.recall == "step" and self.retriever is None:
            raise UsageError("Recalling at every step needs to know what a step reads; give --retrieve NAME as well.")
        if (
            archive.recall == "step"
            and self.retriever is not None
            and self.retriever.retrieval().summary == "attention"
        ):
            raise UsageError(
                f"--retrieve {self.retriever.name} looks at what is held, and cannot recall at a step; leave it out: "
                "--archive recalls by attention at every turn."
            )
        if archive.recall == "turn" and self.retriever is not None:
            raise UsageError(
                f"A turn recalls beside all that is held, and --retrieve {self.retriever.name} reads a part of it; "
                "give --recall step, or leave out --retrieve."
            )


def context_config(model: Model, config: EngineConfig, n_ctx: int) -> ContextConfig:
    """The context that an engine needs.

    Raises:
        UsageError: the paged cache cannot serve the model's architecture.
    """
    policy, storage = config.policy, config.storage
    asking = config.retriever.n_queries if config.retriever else ASKING if config.archive else 0
    paged = config.paged
    formats = storage.formats
    if paged:
        check_paged(model, policy, storage)
        formats = tuple(filter(model.stores, policy.formats)) or formats
    return ContextConfig(
        n_ctx=n_ctx if paged else max(n_ctx, config.n_pool),
        n_batch=max(config.n_batch, config.n_seq_max),
        n_ubatch=config.n_ubatch,
        n_threads=config.n_threads,
        n_seq_max=config.n_seq_max,
        n_outputs=config.n_outputs,
        paged=paged,
        formats=formats,
        rotate=bool(formats) and (bool(policy.formats) or storage.rotates),
        kivi_bits=storage.bits,
        kivi_group=storage.group,
        # all of a guide looks, and all of an open unit asks
        n_window=max(policy.n_window, config.guide, asking),
        mass=policy.mass,
        window_format=config.kv_swa if paged else "f16",
        portable=paged and config.kernels == "portable",
    )


def check_kernels(kernels: str, policy: Policy, storage: Storage) -> None:
    """Refuses what only the page kernels can compute, where stock operators were asked for.

    Raises:
        UsageError: with the policy or the storage, and what to do.
    """
    if kernels != "portable":
        return
    if policy.formats:
        needs = f"Policy {policy.name} stores tokens in formats other than f16"
        instead = f"a policy that leaves all in f16, such as {settings.STORED_POLICY}"
    elif policy.mass != "none":
        needs = f"Policy {policy.name} accumulates the attention that every token receives"
        instead = f"a policy that does not, such as {settings.STORED_POLICY}"
    elif storage.demotes:
        needs, instead = f"--kv {storage.name} stores tokens in formats other than f16", "leave out --kv"
    else:
        return
    raise UsageError(f"{needs}, for which the page kernels are needed; use --kernels auto, or {instead}.")


def _least_budget(config: EngineConfig) -> int:
    return int(config.budget.value) if config.budget.unit == "tokens" else config.policy.min_budget


def chunk_fits(config: EngineConfig, n_ctx: int) -> bool:
    """Whether the budget and a chunk have room together."""
    return _least_budget(config) + config.chunk + config.guide <= n_ctx


def check_paged(model: Model, policy: Policy, storage: Storage) -> None:
    """Refuses a model that the paged cache cannot serve, and says which settings run it.

    Raises:
        UsageError: with the reason.
    """
    try:
        model.check_paged()
    except UsageError as error:
        if not storage.demotes:
            raise
        reason = str(error).partition("; use --policy full")[0].rstrip(".")
        what = f"use --policy full without --kv {storage.name}" if policy.evicts else f"leave out --kv {storage.name}"
        raise UsageError(f"{reason}; {what}, which runs it on llama.cpp's own cache.") from None


def check_chunk(config: EngineConfig, n_ctx: int) -> None:
    """Refuses chunked prefill where the budget and a chunk have no room together."""
    if not chunk_fits(config, n_ctx):
        budget = _least_budget(config)
        guide = f" and a guide of {config.guide}" if config.guide else ""
        raise UsageError(
            f"A budget of {budget} tokens and a chunk of {config.chunk}{guide} do not fit into a context of "
            f"{n_ctx}; use a larger context (-c), a smaller --chunk or a smaller budget."
        )
