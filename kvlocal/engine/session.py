"""A conversation on disk: its cache as it is, evicted and quantized, with what it is made of.

The file: eight bytes of magic, the length of the header, the header in JSON, the parts that it lists one after the
other, and the SHA-256 of all that. Nothing of it is used before the sum is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvlocal import __version__
from kvlocal.engine.config import context_config
from kvlocal.engine.engine import Engine, Mode, Progress
from kvlocal.errors import KVError, UsageError
from kvlocal.files import replace_file
from kvlocal.native import library

MAGIC = b"KVLSESS1"
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


@dataclass
class Session:
    """What a file holds beside the cache.

    Attributes:
        messages: the conversation, as :class:`kvlocal.engine.chat.Chat` has it; empty for a prompt.
        in_cache: template text that the cache has seen; empty without a cache, where all is to be read again.
        budget: of the cache.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    in_cache: str = ""
    budget: str = ""


def fingerprint(path: Path) -> str:
    """A model file's name for itself: its size, its first megabyte (metadata and tensors' shapes) and samples of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
    parts = {"tokens": b"", "logits": b"", "cache": b""}
    if sequence.tokens and usual:
        logits = sequence.last_logits()
        parts["tokens"] = np.array(sequence.tokens, np.int32).tobytes()
        parts["logits"] = b"" if logits is None else logits.astype(np.float32).tobytes()
        parts["cache"] = engine.context.save(sequence.seq)
    session = replace(session, in_cache=session.in_cache if parts["cache"] else "", budget=str(engine.config.budget))
    header = {
        "version": __version__,
        "model_name": engine.model_name,
        "settings": settings(engine),
        "rolled": sequence.rolled,
        "evicted_at": max(sequence.evicted_at - sequence.rolled, 0),
        "session": asdict(session),
        "parts": {name: len(part) for name, part in parts.items()},
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    body = b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *parts.values()])
    try:
        replace_file(path, body + hashlib.sha256(body).digest())
    except OSError as error:
        raise KVError(f"The session cannot be written to {path}: {error.strerror or error}.") from error
    return len(body) + 32


def load(path: Path, engine: Engine) -> Session:
    """Put a saved session in the place of sequence 0.

    Raises:
        UsageError: no such file, not a session, or of other settings; the engine is as before.
        KVError: the file is damaged or cannot be read, or the cache has no room; in the last case it may be empty.
    """
    header, parts = _read(path)
    _compare(path, header["settings"], settings(engine))
    tokens = np.frombuffer(parts["tokens"], np.int32).tolist()
    if len(tokens) >= engine.n_max:
        raise UsageError(
            f"{path} holds {len(tokens)} tokens, this context has room for {engine.n_max - 1}; use a larger one (-c)."
        )
    if not parts["cache"]:
        engine.sequences[0].release()
        return Session(**header["session"])
    sequence = engine.sequences[0]
    sequence.load(
        parts["cache"],
        tokens,
        rolled=header["rolled"],
        evicted_at=header["evicted_at"] + header["rolled"],
        logits=np.frombuffer(parts["logits"], np.float32) if parts["logits"] else None,
    )
    engine.evictor.watch(sequence)
    return Session(**header["session"])


def prefill_cached(
    path: Path,
    engine: Engine,
    tokens: Sequence[int],
    *,
    on_progress: Progress | None = None,
    mode: Mode | None = None,
) -> int:
    """Make sequence 0 end in ``tokens``; what a prompt cache on disk begins with is not read again, what is new goes
    there.

    Returns:
        How many tokens were found there.

    Raises:
        UsageError: the file is not a session, or of other settings. KVError: it is damaged.
    """
    if path.exists() and load(path, engine).budget != str(engine.config.budget):
        engine.sequences[0].release()  # what another budget left is not what this one would
    had = list(engine.sequences[0].tokens)
    reread = engine.extend(list(tokens), on_progress=on_progress, mode=mode)
    if had != list(tokens):
        save(path, engine, Session())
    n_same = next((i for i, pair in enumerate(zip(had, tokens, strict=False)) if pair[0] != pair[1]), len(had))
    return 0 if reread else min(n_same, len(tokens))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"There is no session {path}; /save or --session writes one.") from None
    except OSError as error:
        raise KVError(f"The session {path} cannot be read: {error.strerror or error}.") from error
    if not data.startswith(MAGIC):
        raise UsageError(f"{path} is not a session of kvlocal (it begins with {data[:8]!r}).")
    body, digest = data[:-32], data[-32:]
    if len(data) < len(MAGIC) + 8 + 32 or hashlib.sha256(body).digest() != digest:
        raise KVError(
            f"The session {path} is damaged: its checksum does not fit its {len(data)} bytes. It cannot be used; "
            "save it again."
        )
    start = len(MAGIC) + 8
    end = start + int.from_bytes(body[len(MAGIC) : start], "little")
    try:
        header = json.loads(body[start:end])
        parts = {}
        for name in ("tokens", "logits", "cache"):
            size = header["parts"][name]
            parts[name] = body[end : end + size]
            end += size
        _ = [header["settings"][name] for name in _WHAT]
        Session(**header["session"])
        header["rolled"] + header["evicted_at"]
    except (ValueError, LookupError, TypeError) as error:
        raise KVError(f"The session {path} is damaged: its header makes no sense ({error}).") from error
    return header, parts


_WHAT = {
    "model": "another model",
    "policy": "another policy",
    "policy_args": "other parameters of the policy",
    "kv": "another storage (--kv)",
    "library": "another version of llama.cpp",
}


def _compare(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what does not go together, and say what it is."""
    for name, what in _WHAT.items():
        if saved[name] == now[name]:
            continue
        if name == "model":
            detail = "load it with the model file that it was saved with"
        elif isinstance(now[name], dict):
            differs = [key for key in {**saved[name], **now[name]} if saved[name].get(key) != now[name].get(key)]
            detail = ", ".join(f"{key} {saved[name].get(key)}, now {now[name].get(key)}" for key in differs)
        else:
            detail = f"{saved[name]}, now {now[name]}"
        raise UsageError(f"The session {path} was saved with {what}: {detail}.")
