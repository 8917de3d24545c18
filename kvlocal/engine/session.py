"""A conversation on disk: its cache as it is, evicted and quantized, with what it is made of.

The file: eight bytes of magic, the length of the header, the header in JSON, the parts that it lists one after the
other, and the SHA-256 of all that. Nothing of it is used before the sum is right.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from kvlocal import __version__
from kvlocal.engine.config import context_config
from kvlocal.engine.engine import Engine, Mode, Progress
from kvlocal.engine.sequence import Sequence, n_common
from kvlocal.errors import KVError, UsageError
from kvlocal.files import replace_file
from kvlocal.models.identity import fingerprint
from kvlocal.native import library
from kvlocal.native.cache import PagedCache

MAGIC = b"KVLSESS1"


Kind = Literal["chat", "prompt"]


@dataclass
class Session:
    """What a file holds beside the cache.

    Attributes:
        messages: the conversation, as :class:`kvlocal.engine.chat.Chat` has it; empty for a prompt.
        answers: by the index of their message, as text, the tokens of answers as they were generated.
        budget: of the cache.
        dropped: why the cache of the file was left out, empty if it was not; never saved.
        kind: a conversation, or a prompt whose cache is kept.
        note: what became of the archive if it was left out, a sentence; never saved.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    budget: str = ""
    kind: Kind = "prompt"
    dropped: str = ""
    note: str = ""

    SAVED: ClassVar = ("messages", "answers", "budget", "kind")


def settings(engine: Engine) -> dict[str, Any]:
    """What must be the same where a session goes on; the budget and the size of the context may differ."""
    config = engine.config
    policy = config.policy
    return {
        "model": fingerprint(config.model),
        "policy": policy.name,
        "policy_args": asdict(policy) if is_dataclass(policy) else {},
        "kv": asdict(config.storage),
        "library": library.build_info()["llama_cpp_commit"],
    }


def save(path: Path, engine: Engine, session: Session) -> int:
    """Write sequence 0 of an engine; a file that is there is replaced at once or not at all. Returns bytes written.

    Without a cache that could be used again only the conversation is written, which is then read again.

    Raises:
        UsageError: there is nothing to save.
        KVError: the cache or the file cannot be written.
    """
    sequence = engine.sequences[0]
    if not sequence.tokens and not session.messages:
        raise UsageError("There is nothing to save yet: nothing was read.")
    # after a change of policy the cache may be one that nobody else would make for these settings
    usual = engine.context.config == context_config(engine.model, engine.config, engine.n_ctx)
    parts: dict[str, bytes | memoryview] = {"tokens": b"", "logits": b"", "cache": b"", "archive": b""}
    if sequence.tokens and usual:
        logits = sequence.last_logits()
        parts["tokens"] = np.array(sequence.tokens, np.int32).tobytes()
        parts["logits"] = b"" if logits is None else logits.astype(np.float32).tobytes()
        parts["cache"] = engine.context.save(sequence.seq)
    session = replace(session, budget=str(engine.config.budget))
    archive, tag = None, ""
    if parts["cache"] and sequence.archived and engine.cache is not None:
        archive = _save_archive(path, engine.cache, sequence)
        tag = archive.name[-32:]
        parts["archive"] = engine.cache.archive_table(sequence.seq).tobytes()
    header = {
        "version": __version__,
        "model_name": engine.model_name,
        "settings": settings(engine),
        "rolled": sequence.rolled,
        "evicted_at": max(sequence.evicted_at - sequence.rolled, 0),
        "session": {name: getattr(session, name) for name in Session.SAVED},
        "archive": tag,
        "parts": {name: len(part) for name, part in parts.items()},
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    body = [MAGIC, len(text).to_bytes(8, "little"), text, *parts.values()]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    try:
        replace_file(path, *body, digest.digest())
    except OSError as error:
        raise KVError(f"The session cannot be written to {path}: {error.strerror or error}.") from error
    for other in path.resolve().parent.glob(glob.escape(_archive_path(path, "").name) + "*"):
        if other != archive:
            other.unlink(missing_ok=True)
    return sum(len(part) for part in body) + digest.digest_size + (archive.stat().st_size if archive else 0)


def _archive_path(path: Path, tag: str) -> Path:
    """The archive beside a session."""
    path = path.resolve()
    return path.with_name(f"{path.name}.archive-{tag}")


def _save_archive(path: Path, cache: PagedCache, sequence: Sequence) -> Path:
    """Write what is new of the archive beside the session that lies there, or all of it beside another one."""
    there = sequence.archive_file
    beside = there is not None and there.exists() and there == _archive_path(path, there.name[-32:])
    if there is not None and beside and cache.save_archive(sequence.seq, there, there.name[-32:]):
        return there
    # a name of its own: the session that is there has its own until it is replaced
    tag = uuid.uuid4().hex
    sequence.archive_file = _archive_path(path, tag)
    cache.save_archive(sequence.seq, sequence.archive_file, tag)
    return sequence.archive_file


def load(path: Path, engine: Engine, kind: Kind | None = None) -> Session:
    """Put a saved session in the place of sequence 0; one of another ``kind`` is refused.

    A cache of other settings, or of another version, is left out: ``dropped`` says why, the text can be read again.

    Raises:
        UsageError: no such file, not a session, or of another kind or model; the engine is as before.
        KVError: the file is damaged or cannot be read, or the cache has no room; in the last case it may be empty.
    """
    with _read(path) as (header, parts):
        session = _session(path, header)
        if kind is not None and session.kind != kind:
            held, wanted = _KINDS[session.kind], _KINDS[kind]
            raise UsageError(f"{path} holds {held}, not {wanted}; it is left as it is, name another.")
        session.dropped = _differs(path, header["settings"], settings(engine))
        sequence = engine.sequences[0]
        if not len(parts["cache"]) or session.dropped:
            sequence.release()
            return session
        tokens = np.frombuffer(parts["tokens"], np.int32).tolist()
        if len(tokens) >= engine.n_max:
            room = engine.n_max - 1
            raise UsageError(
                f"{path} holds {len(tokens)} tokens, this context has room for {room}; use a larger one (-c)."
            )
        sequence.load(
            parts["cache"],
            tokens,
            rolled=header["rolled"],
            evicted_at=header["evicted_at"] + header["rolled"],
            logits=np.frombuffer(parts["logits"], np.float32).copy() if len(parts["logits"]) else None,
        )
        if header.get("archive"):
            session.note = _load_archive(path, engine, str(header["archive"]), parts["archive"])
        engine.evictor.watch(sequence)
        return session


def _load_archive(path: Path, engine: Engine, tag: str, table: memoryview) -> str:
    """Take the archive beside a session; returns why it is left out, empty if it is not."""
    if not engine.evictor.archives:
        return "Its archive is left out, and the next save drops it; --archive auto takes it."
    try:
        engine.evictor.adopt(
            engine.sequences[0], _archive_path(path, tag), tag, np.frombuffer(table, np.int64).reshape(-1, 3)
        )
    except KVError as error:
        return str(error)
    return ""


def prefill_cached(
    path: Path,
    engine: Engine,
    tokens: Several[int],
    *,
    on_progress: Progress | None = None,
    mode: Mode | None = None,
    on_unsaved: Callable[[KVError], None] | None = None,
) -> int:
    """Make sequence 0 end in ``tokens``; what a prompt cache on disk begins with is not read again, what is new goes
    there.

    ``on_unsaved`` is told why the file cannot be written; the prompt was read all the same.

    Returns:
        How many tokens were found there.

    Raises:
        UsageError: the file is not a prompt cache, or of other settings. KVError: it is damaged, or cannot be written
            and there is no ``on_unsaved``.
    """
    if path.exists() and load(path, engine, "prompt").budget != str(engine.config.budget):
        engine.sequences[0].release()  # what another budget left is not what this one would
    had = list(engine.sequences[0].tokens)
    reread = engine.extend(list(tokens), on_progress=on_progress, mode=mode)
    if had != list(tokens):
        try:
            save(path, engine, Session())
        except KVError as error:
            if on_unsaved is None:
                raise
            on_unsaved(error)
    return 0 if reread else n_common(had, tokens)


@contextmanager
def _read(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, memoryview]]]:
    """The header and the parts of a file, which is mapped and not copied."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if magic else None
    except FileNotFoundError:
        raise UsageError(f"There is no session {path}; /save or --session writes one.") from None
    except OSError as error:
        raise KVError(f"The session {path} cannot be read: {error.strerror or error}.") from error
    if mapped is None or magic != MAGIC:
        raise UsageError(f"{path} is not a session of kvlocal (it begins with {magic!r}).")
    views: list[memoryview] = []

    def view(begin: int, end: int) -> memoryview:
        views.append(data[begin:end])
        return views[-1]

    with mapped, memoryview(mapped) as data:
        try:
            size = len(data)
            start = len(MAGIC) + 8
            if size < start + 32 or hashlib.sha256(view(0, size - 32)).digest() != view(size - 32, size):
                raise KVError(
                    f"The session {path} is damaged: its checksum does not fit its {size} bytes. It cannot be used; "
                    "save it again."
                )
            end = start + int.from_bytes(view(len(MAGIC), start), "little")
            try:
                header = json.loads(bytes(view(start, min(end, size - 32))))
                parts = {}
                for name, width in (("tokens", 4), ("logits", 4), ("cache", 1), ("archive", 24)):
                    n = int(header["parts"].get(name, 0) if name == "archive" else header["parts"][name])
                    if n < 0 or n % width or end + n > size - 32:
                        raise ValueError(f"{n} bytes of {name}")
                    parts[name] = view(end, end + n)
                    end += n
                _ = [header["settings"][name] for name in _WHAT]
                if not re.fullmatch("([0-9a-f]{32})?", header.get("archive", "")):
                    raise ValueError("its archive has no name")
                if not all(isinstance(header[name], int) and header[name] >= 0 for name in ("rolled", "evicted_at")):
                    raise ValueError("its positions are no numbers")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise KVError(f"The session {path} is damaged: its header makes no sense ({error}).") from error
            yield header, parts
        finally:
            for each in reversed(views):
                each.release()


def _session(path: Path, header: Mapping[str, Any]) -> Session:
    """What the header says beside the cache; fields of other versions are passed over."""
    try:
        found = header["session"]
        out = Session(**{name: found[name] for name in Session.SAVED if name in found})
        texts = [part for message in out.messages for part in (message["role"], message["content"])]
        if "kind" not in found:
            out.kind = "chat" if out.messages else "prompt"  # written by an earlier version
        if out.kind not in _KINDS:
            raise ValueError(f"its kind is {out.kind!r}")
        if not isinstance(out.messages, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("its messages are no texts")
        np.array([int(i) for i in out.answers] + [token for some in out.answers.values() for token in some], np.int32)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise KVError(f"The session {path} is damaged: its header makes no sense ({error}).") from error
    return out


_KINDS: dict[Kind, str] = {
    "chat": "a conversation (chat --session)",
    "prompt": "the cache of a prompt (--prompt-cache)",
}


_WHAT = {
    "model": "another model",
    "policy": "another policy",
    "policy_args": "other parameters of the policy",
    "kv": "another storage (--kv)",
    "library": "another version of llama.cpp",
}


def _differs(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the settings of a saved cache differ from these, empty if they do not.

    Raises:
        UsageError: it belongs to another model.
    """
    for name, what in _WHAT.items():
        if saved[name] == now[name]:
            continue
        if name == "model":
            detail = "load it with the model file that it was saved with"
            raise UsageError(f"The session {path} was saved with {what}: {detail}.")
        if isinstance(now[name], dict) and isinstance(saved[name], dict):
            differs = [key for key in {**saved[name], **now[name]} if saved[name].get(key) != now[name].get(key)]
            detail = ", ".join(f"{key} {saved[name].get(key)}, now {now[name].get(key)}" for key in differs)
        else:
            detail = f"{saved[name]}, now {now[name]}"
        return f"it was saved with {what}: {detail}"
    return ""
