"""A loaded GGUF model: weights, tokenizer, chat template."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlocal.errors import KVError, UsageError
from kvlocal.native import library
from kvlocal.native.formats import FORMATS


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
        handle: Any = self.native.lib.kvl_load_model(str(path).encode(), params)
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
        return self.meta("general.name") or self.path.stem

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

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``. ``add_special`` adds the model's BOS, ``parse_special`` reads ``<|…|>`` markers."""
        data = text.encode()
        size = len(data) + 8
        while True:
            buffer = (self.llama.llama_token * size)()
            n = self.llama.llama_tokenize(self.vocab, data, len(data), buffer, size, add_special, parse_special)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens are empty."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self.llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(t) for t in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self.llama.llama_vocab_is_eog(self.vocab, token))

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """Every token that ends an answer."""
        return [token for token in range(self.n_vocab) if self.is_end(token)]

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """The conversation in the model's own chat template, up to where the assistant answers.

        Raises:
            UsageError: the model has no chat template, or the template refuses the messages.
        """
        template = self.meta("tokenizer.chat_template")
        if not template:
            raise UsageError(f"{self.name} has no chat template; use --no-chat-template to give it plain text.")
        # imports the binding's server-side modules: only when a template is used
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def special(token: int) -> str:
            text = self.llama.llama_vocab_get_text(self.vocab, token) if token >= 0 else None
            return text.decode("utf-8", "replace") if text else ""

        formatter = Jinja2ChatFormatter(
            template,
            eos_token=special(self.llama.llama_vocab_eos(self.vocab)),
            bos_token=special(self.llama.llama_vocab_bos(self.vocab)),
        )
        try:
            return str(formatter(messages=messages).prompt)  # type: ignore[arg-type, unused-ignore]
        except Exception as error:  # whatever a model's own template raises
            raise UsageError(f"The chat template of {self.name} refuses the conversation: {error}.") from error

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return self.template_tokens(self.chat_text(messages))

    def template_tokens(self, text: str) -> list[int]:
        """Tokens of rendered template text: a BOS is added only if the template did not write it."""
        bos = self.llama.llama_vocab_bos(self.vocab)
        tokens = self.tokenize(text, add_special=True)
        if bos >= 0 and tokens[:2] == [bos, bos]:
            del tokens[0]
        return tokens
