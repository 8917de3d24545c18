"""A loaded GGUF model: weights, tokenizer, chat template."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlocal.errors import KVError
from kvlocal.native import library
from kvlocal.native.cuts import PART, Cuts
from kvlocal.native.formats import FORMATS
from kvlocal.native.names import display_name
from kvlocal.native.text import check_text

_SPM = 1  # LLAMA_VOCAB_TYPE_SPM
_ANCHOR = "\x02"


class Model:
    """Weights and vocabulary of one GGUF file, shared by any number of contexts.

    ``no_alloc``: without the weights. Contexts then allocate nothing either, say what they would take
    (:meth:`Context.breakdown`), and decode by counting: their caches grow, and hold nothing.

    Raises:
        KVError: the file is truncated or corrupted.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int = 0, no_alloc: bool = False) -> None:
        self.native = library.load()
        self.llama = self.native.llama
        self.path = path
        self.no_alloc = no_alloc
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if no_alloc:
            params.no_alloc = True
            params.load_mode = self.llama.LLAMA_LOAD_MODE_NONE  # nothing to map
        self.native.log.clear()
        handle: Any = self.native.lib.kvl_load_model(os.fsencode(path), params)
        if not handle:
            reason = self.native.last_error() or next((line for line in self.native.log if "error" in line.lower()), "")
            detail = f" ({reason.split(': ', 1)[-1]})" if reason else ""
            raise KVError(f"{path} cannot be loaded as a GGUF model{detail}; if it was downloaded, download it again.")
        self._handle = handle
        self._free = weakref.finalize(self, self.llama.llama_model_free, handle)
        self._vocab = self.llama.llama_model_get_vocab(handle)

    def close(self) -> None:
        """Give the weights back; happens by itself when nobody holds the model any more."""
        self._free()
        self._handle = None

    @property
    def handle(self) -> Any:
        """The llama_model.

        Raises:
            KVError: it was closed.
        """
        if self._handle is None:
            raise KVError("The model was closed; load it again to go on.")
        return self._handle

    @property
    def vocab(self) -> Any:
        """The llama_vocab; raises as :attr:`handle`."""
        return self._vocab if self.handle else None

    @property
    def name(self) -> str:
        """What it is called where people read it; see :func:`kvlocal.native.names.display_name`."""
        return display_name(self.path, self.meta("general.name"))

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained for, tokens."""
        return int(self.llama.llama_model_n_ctx_train(self.handle))

    @property
    def n_vocab(self) -> int:
        return int(self.llama.llama_vocab_n_tokens(self.vocab))

    def meta(self, key: str) -> str | None:
        """A metadata value of the GGUF file as text, ``None`` if absent."""
        buffer = ctypes.create_string_buffer(1024)
        size = self.llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        if size >= len(buffer):
            buffer = ctypes.create_string_buffer(size + 1)
            size = self.llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else None

    def check_paged(self) -> None:
        """Raises :class:`UsageError` when the paged cache cannot serve this architecture."""
        self.native.check(self.native.lib.kvl_model_check(self.handle))

    def stores(self, storage: str) -> bool:
        """Whether the paged cache can store this model's keys and values in one of its formats."""
        return self.native.lib.kvl_format_check(self.handle, FORMATS.index(storage)) == 0

    #
    # text and tokens
    #

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``, never with an end-of-text token after it.

        ``add_special``: the model's BOS comes first, if it has one. ``parse_special``: text such as ``<|im_end|>``
        becomes the control token of that name; only for text of the model's own template.

        Raises:
            UsageError: the text has lone surrogates, which have no UTF-8.
        """
        return self.tokenize_parts([(text, parse_special)], add_special=add_special)[0]

    def tokenize_parts(
        self, parts: Sequence[tuple[str, bool]], *, add_special: bool = True, after: int | None = None
    ) -> list[list[int]]:
        """Token ids of texts that follow each other, ``(text, parse_special)``; one list a text, BOS once in the first.

        Every text is tokenized by itself. After plain text none gets the space that SentencePiece puts before a text.
        ``after``: the token before all of them, if there is one.
        """
        out: list[list[int]] = []
        last = after
        for text, parse_special in parts:
            joined = last is not None and not self._is_marker(last)
            out.append(self._encode(text, True, joined=joined) if parse_special else self._plain(text, joined=joined))
            last = out[-1][-1] if out[-1] else last
        if add_special and out:
            self._begin(out)
        return out

    def _begin(self, parts: list[list[int]]) -> None:
        """BOS exactly once: templates may have written it."""
        bos = int(self.llama.llama_vocab_bos(self.vocab))
        if bos < 0:
            return
        first = next((part for part in parts if part), parts[0])
        while first[:2] == [bos, bos]:
            del first[0]
        if self.llama.llama_vocab_get_add_bos(self.vocab) and first[:1] != [bos]:
            parts[0].insert(0, bos)

    @functools.cached_property
    def _cuts(self) -> Cuts | None:
        """Where long texts may be cut, for the tokenizer that takes too long otherwise."""
        if self.llama.llama_vocab_type(self.vocab) != _SPM:
            return None
        texts = (self.llama.llama_vocab_get_text(self.vocab, token) for token in range(self.n_vocab))
        return Cuts(text.decode("utf-8", "replace") for text in texts)

    def _encode(self, text: str, parse_special: bool, *, joined: bool = False) -> list[int]:
        """``joined``: plain text stands before it, so that no space belongs in between."""
        if not parse_special and len(text) > 2 * PART and self._cuts is not None:
            first, *rest = self._cuts.split(text)
            if rest:
                parts = [self._encode(first, False, joined=joined)]
                parts += [self._encode(part, False, joined=True) for part in rest]
                return list(itertools.chain.from_iterable(parts))
        if joined and text and self.llama.llama_vocab_type(self.vocab) == _SPM:
            # a control character merges with nothing
            before, both = (self._encode(t, parse_special) for t in (_ANCHOR, _ANCHOR + text))
            if both[: len(before)] == before:
                return both[len(before) :]
        data = check_text(text, "The text").encode()
        size = len(data) + 8
        while True:
            buffer = (self.llama.llama_token * size)()
            n = self.llama.llama_tokenize(self.vocab, data, len(data), buffer, size, False, parse_special)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    def _plain(self, text: str, *, joined: bool) -> list[int]:
        """Tokens of plain text: what would be a marker nevertheless is spelled out.

        Some models declare their markers as tokens that text may contain, and SentencePiece merges letters into any
        token of the vocabulary.
        """
        tokens = self._encode(text, False, joined=joined)
        found = [self._text(token) for token in set(tokens) & self._markers]
        if found:
            tokens = []
            for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, found))})", text)):
                for run in part if i % 2 else [part]:
                    tokens += self._encode(run, False, joined=joined or bool(tokens))
        if not any(self._is_control(token) for token in set(tokens)):
            return tokens
        letters = ([t] if not self._is_control(t) else self._spelled(self._text(t)) for t in tokens)
        return [token for some in letters for token in some]

    def _spelled(self, text: str) -> list[int]:
        return [token for char in text for token in self._encode(char, False, joined=True)]

    def _text(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace")

    def _is_control(self, token: int) -> bool:
        return bool(self.llama.llama_vocab_is_control(self.vocab, token))

    def _is_marker(self, token: int) -> bool:
        """Whether the tokenizer finds this token before it looks at text."""
        kinds = self.llama.LLAMA_TOKEN_ATTR_CONTROL | self.llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        return bool(self.llama.llama_vocab_get_attr(self.vocab, token) & (kinds | self.llama.LLAMA_TOKEN_ATTR_UNKNOWN))

    @functools.cached_property
    def _markers(self) -> frozenset[int]:
        """User-defined tokens, but for white space, that the chat template writes."""
        template = self.meta("tokenizer.chat_template") or ""
        tokens = {token for token in self._encode(template, True) if not self._is_control(token)}
        return frozenset(t for t in tokens if self._is_marker(t) and self._text(t).strip())

    def special_text(self, name: str) -> str:
        """The text of the model's ``bos``, ``eos``, ``pad`` or ``unk`` token, empty without one."""
        if name == "unk":
            token = int(self.meta("tokenizer.ggml.unknown_token_id") or -1)
        else:
            token = int(getattr(self.llama, f"llama_vocab_{name}")(self.vocab))
        text = self.llama.llama_vocab_get_text(self.vocab, token) if 0 <= token < self.n_vocab else None
        return text.decode("utf-8", "replace") if text else ""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; those of control tokens are empty without ``special``."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self.llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def entry(self, token: int) -> str:
        """What the vocabulary itself calls a token."""
        return str(self.llama.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace"))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(t) for t in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self.llama.llama_vocab_is_eog(self.vocab, token))

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """Every token that ends an answer."""
        return [token for token in range(self.n_vocab) if self.is_end(token)]
