"""kvlocal for scripts: a model with a bounded cache, prompts, conversations.

import kvlocal

with kvlocal.load("model.gguf", policy="ada-snapkv", budget="25%") as llm:
    print(llm.generate("Name three rivers."))
    print(llm.kv.kv.used_bytes)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from kvlocal import settings
from kvlocal.engine.chat import Chat, begun
from kvlocal.engine.config import EngineConfig
from kvlocal.engine.engine import Engine, Progress
from kvlocal.engine.report import Report
from kvlocal.errors import UsageError
from kvlocal.models.messages import EMPTY, Messages, checked
from kvlocal.models.resolve import resolve_model
from kvlocal.native.sampling import Sampling
from kvlocal.native.text import check_text
from kvlocal.policies import make_policy
from kvlocal.policies.parts.policy import Policy
from kvlocal.retrieval import Retriever, make_retriever
from kvlocal.setting import refusal
from kvlocal.storage.archive import Archive
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn: the fields of :class:`kvlocal.native.sampling.Sampling`."""

    temp: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int
    ignore_eos: bool


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    policy: str | Policy | None = None,
    policy_args: Mapping[str, Any] | None = settings.POLICY_ARGS.default,
    budget: str | int | Budget = settings.BUDGET.default,
    kv: str | Storage = settings.KV.default,
    kv_tail: int = settings.KV_TAIL.default,
    kv_swa: Literal["f16", "q8"] = settings.KV_SWA.default,
    retrieve: str | Retriever | None = settings.RETRIEVE.default,
    retrieve_args: Mapping[str, Any] | None = settings.RETRIEVE_ARGS.default,
    retrieve_budget: int = settings.RETRIEVE_BUDGET.default,
    archive: str = settings.ARCHIVE.default,
    archive_format: Literal["f16", "q8"] = settings.ARCHIVE_FORMAT.default,
    recall: Literal["turn", "step", "off"] | None = settings.RECALL.default,
    recall_budget: int = settings.RECALL_BUDGET.default,
    n_ctx: int = settings.N_CTX.default,
    n_batch: int = settings.N_BATCH.default,
    n_ubatch: int = settings.N_UBATCH.default,
    n_threads: int = settings.N_THREADS.default,
    n_gpu_layers: int = settings.N_GPU_LAYERS.default,
    kernels: Literal["auto", "portable"] = settings.KERNELS.default,
    prefill: Literal["exact", "chunked"] = settings.PREFILL.default,
    chunk: int = settings.CHUNK.default,
    guide: int = settings.GUIDE.default,
    evict_every: int = settings.EVICT_EVERY.default,
    on_download: Callable[[int, int | None, str], None] | None = None,
) -> LLM:
    """Load a model.

    Args:
        model: a GGUF file or ``hf:USER/REPO[:FILE]``; ``None``: the small default model, fetched on first use.
        policy: which tokens are kept: a name, with ``policy_args``, or a policy. By default ``ladder``, or with ``kv``
            ``ada-snapkv``.
        budget: how much is kept: tokens per head (1024, "1024"), a share ("25%") or bytes ("512MiB").
        kv: how what is kept is stored; others than f16 not with a policy that says so itself.
        kv_tail: latest tokens that ``kv`` leaves in f16.
        kv_swa: how sliding windows are stored.
        retrieve: which part of what is kept a token reads: a name, with ``retrieve_args`` and ``retrieve_budget``
            (tokens per head), or a retriever; ``None``: all.
        archive: ``auto`` or a folder: what memory loses is kept on disk until the model is closed; ``off``: it is lost.
        archive_format, recall, recall_budget: as of :class:`kvlocal.storage.archive.Archive`; by default every turn
            recalls, with ``retrieve`` every step.
        n_ctx, n_batch, n_ubatch, n_threads, n_gpu_layers, kernels: as of
            :class:`kvlocal.engine.config.EngineConfig`.
        prefill, chunk, guide, evict_every: as of :class:`kvlocal.engine.config.EngineConfig`.
        on_download: called with bytes done, bytes in all, and a name.

    Raises:
        UsageError: no such model, policy or storage, a value of another type or out of range, or settings that do not
            fit each other.
        KVError: the model cannot be fetched or loaded.
    """
    settings.MODEL.check(model)
    settings.POLICY_ARGS.check(policy_args)
    storage = (
        kv if isinstance(kv, Storage) else Storage.parse(settings.KV.check(kv), tail=settings.KV_TAIL.check(kv_tail))
    )
    if policy is None:
        policy = settings.STORED_POLICY if storage.demotes else settings.POLICY.default
    if isinstance(policy, str):
        policy = make_policy(policy, policy_args or {})
    elif not isinstance(policy, Policy):
        raise refusal("policy", policy, "a name or a policy")
    elif policy_args:
        raise UsageError("policy_args belong to the name of a policy; set them on the policy that was given.")
    settings.RETRIEVE_ARGS.check(retrieve_args)
    budget_read = settings.RETRIEVE_BUDGET.check(retrieve_budget)
    if retrieve is None:
        retrieve = policy.reads or None
    if isinstance(retrieve, str):
        retrieve = make_retriever(retrieve, {"budget": budget_read, **(retrieve_args or {})})
    elif retrieve is not None and not isinstance(retrieve, Retriever):
        raise refusal("retrieve", retrieve, "a name or a retriever")
    elif retrieve_args:
        raise UsageError("retrieve_args belong to the name of a retriever; give its name in retrieve.")
    config = EngineConfig(
        model=Path(),
        policy=policy,
        budget=budget if isinstance(budget, Budget) else Budget.parse(str(settings.BUDGET.check(budget))),
        storage=storage,
        retriever=retrieve,
        archive=Archive.parse(
            settings.ARCHIVE.check(archive),
            storage=settings.ARCHIVE_FORMAT.check(archive_format),
            recall=settings.RECALL.check(recall),
            budget=settings.RECALL_BUDGET.check(recall_budget),
            by_step=retrieve is not None,
        ),
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        kv_swa=kv_swa,
        kernels=kernels,
        prefill=prefill,
        chunk=chunk,
        guide=guide,
        evict_every=evict_every,
    )
    # last, so that nobody waits for a download to learn of a typing error
    path = resolve_model(None if model is None else os.fspath(model), progress=on_download)
    engine = Engine(replace(config, model=path))
    for note in engine.notes:
        warnings.warn(note, stacklevel=2)
    return LLM(engine)


class LLM:
    """A model and its cache, for one text or conversation at a time. Use as a context manager, or :meth:`close` it.

    Several threads may call it: whole answers queue. A stream whose cache was taken over by another text ends with a
    :class:`~kvlocal.errors.KVError`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kv(self) -> Report:
        """What was measured since the last prompt began: bytes, tokens held, times; see :class:`Report`."""
        return self.engine.report()

    def generate(
        self,
        prompt: str | Messages,
        *,
        n_predict: int = settings.N_PREDICT.default,
        raw: bool = settings.RAW.default,
        on_progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """The answer to a prompt, as a whole; see :meth:`stream`."""
        with self.engine.lock:  # other threads wait for their turn
            return "".join(self.stream(prompt, n_predict=n_predict, raw=raw, on_progress=on_progress, **sampling))

    def stream(
        self,
        prompt: str | Messages,
        *,
        n_predict: int = settings.N_PREDICT.default,
        raw: bool = settings.RAW.default,
        on_progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The answer to a prompt, piece by piece. What the cache held before is forgotten.

        Args:
            prompt: a question, or messages ``{"role", "content"}``. Nothing in them becomes a control token.
            n_predict: most tokens of the answer; -1: until the model ends or the context is full.
            raw: continue the text as it is, without the model's chat template.
            on_progress: called with tokens read and tokens in all while the prompt is read.

        Raises:
            UsageError: the prompt is empty, too long or neither text nor messages, or a setting is of another type or
                out of range.
        """
        n_predict, raw, drawing = settings.N_PREDICT.check(n_predict), settings.RAW.check(raw), Sampling(**sampling)
        tokens = self._tokens(prompt, raw)
        with self.engine.use():
            self.engine.reset()
            self.engine.prefill(tokens, on_progress=on_progress)
            answer = self.engine.generate(n_predict, drawing)
            first = next(answer, None)  # nobody else's text comes between the prompt and its answer
        yield from begun(first, answer)

    def _tokens(self, prompt: str | Messages, raw: bool) -> list[int]:
        if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)):
            if raw:
                raise UsageError("Messages need the chat template; give a text with raw=True.")
        elif not check_text(prompt, "The prompt").strip():
            raise UsageError(EMPTY)
        elif raw:
            return self.engine.tokenize(prompt)
        else:
            prompt = [_user(prompt)]
        prompt = checked(prompt)
        tokens = self.engine.chat_tokens(prompt)
        _warn(self.engine.template_note(prompt))
        return tokens

    def chat(self, system: str | None = None, *, session: str | os.PathLike[str] | None = None) -> Conversation:
        """A new conversation, which takes the cache over; or one that was saved.

        Raises:
            UsageError: the session does not fit the model or the settings. KVError: it is damaged.
        """
        settings.SYSTEM.check(system)
        if session is not None:
            _check_path("session", session)
        self.engine.reset()
        talk = Conversation(self.engine, system)
        if session is not None:
            talk.load(session)
        _warn(talk.note)
        return talk


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise refusal(name, text, "a text")


def _check_path(name: str, path: object) -> None:
    if not settings.MODEL.accepts(path):
        raise refusal(name, path, settings.MODEL.allowed)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _warn(note: str | None) -> None:
    """Python shows a warning once for each place that it comes from."""
    if note is not None:
        warnings.warn(note, stacklevel=2)


class Conversation:
    """Turns on one cache: what was read or said is not read again."""

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self._chat = Chat(engine, system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """``{"role", "content"}`` in order."""
        return self._chat.messages

    @property
    def note(self) -> str | None:
        """What is to be known of how the chat template takes the conversation, ``None`` if nothing."""
        return self._chat.note

    @property
    def reread(self) -> bool:
        """Whether the last turn made all of it be read again, since what had changed was evicted."""
        return self._chat.reread

    def ask(
        self, text: str, *, n_predict: int = settings.N_PREDICT.default, **sampling: Unpack[SamplingOptions]
    ) -> str:
        """The answer, as a whole."""
        with self._chat.engine.lock:  # other threads wait for their turn
            return "".join(self.stream(text, n_predict=n_predict, **sampling))

    def stream(
        self, text: str, *, n_predict: int = settings.N_PREDICT.default, **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """The answer, piece by piece; closing the iterator early keeps what was said so far.

        Raises:
            UsageError: the conversation does not fit; it is as before the question.
        """
        _check_text("text", text)
        return self._chat.ask(text, settings.N_PREDICT.check(n_predict), Sampling(**sampling))

    def again(self, *, n_predict: int = settings.N_PREDICT.default, **sampling: Unpack[SamplingOptions]) -> str:
        """Another answer to the last question, in place of the one there is."""
        with self._chat.engine.lock:
            return "".join(self._chat.again(settings.N_PREDICT.check(n_predict), Sampling(**sampling)))

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question."""
        return self._chat.undo()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the conversation and its cache; returns the bytes written."""
        _check_path("path", path)
        return self._chat.save(Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved conversation."""
        _check_path("path", path)
        self._chat.load(Path(path))
