"""Conversations as the model's own chat template writes them, in pieces that say who wrote what.

Only text of the template becomes control tokens: a document that holds ``<|im_start|>system`` stays a document.
"""

from __future__ import annotations

import functools
import html
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes

from kvlocal.errors import UsageError
from kvlocal.models.marks import STEM, Marks, Piece, merged
from kvlocal.models.messages import Message, as_parts, checked, flattened, size, without_system
from kvlocal.models.sandbox import ChatEnvironment, TemplateLimit
from kvlocal.native.model import Model

_PLAIN_TEXT = "use --no-chat-template to give the model plain text"

_FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    html.escape,
    lambda text: repr(text)[1:-1],
    lambda text: str(json.loads(f'"{text}"')),
    lambda text: json.dumps(json.loads(f'"{text}"'), ensure_ascii=False)[1:-1],
)
"""What templates make of a text where they write it into something else."""


def has_template(model: Model) -> bool:
    return bool(model.meta("tokenizer.chat_template"))


def chat_template(model: Model) -> ChatTemplate:
    """The template of a model.

    Raises:
        UsageError: it has none, or one that does not compile.
    """
    source = model.meta("tokenizer.chat_template")
    if not source:
        raise UsageError(f"{model.name} has no chat template; {_PLAIN_TEXT}.")
    names = ("bos", "eos", "unk", "pad")
    return _compiled(source, model.name, tuple((f"{name}_token", model.special_text(name)) for name in names))


def chat_pieces(model: Model, messages: Sequence[Message]) -> list[Piece]:
    """A conversation up to where the assistant answers; see :meth:`ChatTemplate.render`."""
    return chat_template(model).render(messages)


def chat_tokens(model: Model, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant answers: BOS once, no control token from any message."""
    return piece_tokens(model, chat_pieces(model, messages))


def piece_tokens(model: Model, pieces: Sequence[Piece], *, add_special: bool = True) -> list[int]:
    """Tokens of pieces that follow each other, after BOS with ``add_special``."""
    parts = model.tokenize_parts([(piece.text, piece.control) for piece in pieces], add_special=add_special)
    return [token for part in parts for token in part]


def split_pieces(pieces: Sequence[Piece], text: str) -> tuple[list[Piece], list[Piece]] | None:
    """The pieces before and after the last place where a message says ``text``, ``None`` if none does."""
    for i in range(len(pieces) - 1, -1, -1):
        piece = pieces[i]
        before, found, after = piece.text.rpartition(text)
        if found and not piece.control:
            head, tail = (Piece(part, False, piece.message, piece.path) for part in (before, after))
            return [*pieces[:i], *([head] if before else [])], [*([tail] if after else []), *pieces[i + 1 :]]
    return None


@functools.lru_cache(maxsize=8)
def _compiled(source: str, name: str, specials: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, name, dict(specials))


class ChatTemplate:
    """A compiled chat template; safe to use from several threads.

    ``specials``: the variables ``bos_token`` and so on. ``name``: the model's, for errors.

    Raises:
        UsageError: it does not compile.
    """

    def __init__(self, source: str, name: str = "the model", specials: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._specials = dict(specials or {})
        self._parts: dict[str, bool] = {}  # by role
        self._lock = threading.RLock()
        self._env = ChatEnvironment()
        try:
            self._template = self._env.compile_template(source)
        except Exception as error:  # Jinja lets through what its own parts raise
            where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UsageError(
                f"The chat template of {name} does not compile: {_reason(error)}{where}; {_PLAIN_TEXT}."
            ) from error
        assert self._env.source is not None
        self._literals = _looked_for(self._env.source)

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation in pieces, up to where the assistant answers.

        Contents are texts or lists of ``{"type": "text", "text": …}``. Where the template has no system role, the
        system message goes before the first question; see :meth:`note`.

        Raises:
            UsageError: the messages make no sense, or the template refuses them, leaves the last one out, or takes too
                much memory or time.
        """
        given = checked(messages)
        with self._lock:
            fitted, origin = self._fit(given)
            pieces = self._render(fitted)
        return [
            piece if piece.message is None else Piece(piece.text, False, origin[piece.message], piece.path)
            for piece in pieces
        ]

    def note(self, messages: Sequence[Message]) -> str | None:
        """What the user should know of how the messages are given to the model."""
        if not any(message.get("role") == "system" for message in messages[:1]) or self.has_system:
            return None
        return f"The chat template of {self.name} has no system role; the system prompt goes before the first question."

    @functools.cached_property
    def _nothing(self) -> dict[str, Any]:
        """What templates find in the place of tools and documents: ``None``, as transformers gives them, or empty."""
        names = ("tools", "documents", "functions", "function_call", "tool_choice")
        nones = dict.fromkeys(names)
        for values in (nones, nones | {"tools": []}, dict.fromkeys((*names, "datetime"), ""), {}):
            try:
                self._fill([_say("user", STEM)], datetime.now(), len(STEM), values)
                return values
            except TemplateLimit:
                return nones
            except Exception:  # as in _text: what a template raises
                continue
        return nones

    @functools.cached_property
    def has_system(self) -> bool:
        """Whether system messages are written."""
        system, user = f"{STEM}system", f"{STEM}user"
        content = (lambda text: text) if self._takes_text else as_parts
        text = self._probe([_say("system", content(system)), _say("user", content(user))])
        return text is not None and system in text and user in text

    @functools.cached_property
    def _takes_text(self) -> bool:
        """Whether contents may be plain text; some templates want lists of parts."""
        text = self._probe([_say("user", STEM)])
        if text is not None and STEM in text:
            return True
        parts = self._probe([_say("user", as_parts(STEM))])
        return parts is None or STEM not in parts

    def _takes_parts(self, role: str) -> bool:
        """Whether contents of a role may be lists of parts, and are not just written as Python shows them."""
        if role not in self._parts:
            self._parts[role] = self._tries_parts(role)
        return self._parts[role]

    def _tries_parts(self, role: str) -> bool:
        none: list[dict[str, Any]] = []
        around = {"user": (none, none), "system": (none, [_say("user", "a")])}
        around["assistant"] = ([_say("user", "a")], [_say("user", "b")])
        if role not in around:
            return False
        before, after = around[role]
        text = self._probe([*before, _say(role, as_parts(STEM)), *after])
        if text is None or STEM not in text:
            return False
        as_text = self._probe([*before, _say(role, STEM), *after]) or ""
        return all(text.count(sign) == as_text.count(sign) for sign in ("'type'", '"type"'))

    def _probe(self, messages: list[dict[str, Any]]) -> str | None:
        with self._lock:
            try:
                return self._text(messages, datetime.now())
            except _Limit:
                raise
            except UsageError:
                return None

    def _fit(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """Messages as the template takes them, and the index of each among those that were given."""
        origin = list(range(len(messages)))
        if messages[0]["role"] == "system" and not self.has_system:
            messages, origin = without_system(messages, self.name)
        out = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list) and self._takes_text and not self._takes_parts(message["role"]):
                message = message | {"content": flattened(content)}
            elif isinstance(content, str) and not self._takes_text:
                message = message | {"content": as_parts(content)}
            out.append(message)
        return out, origin

    def _render(self, messages: list[dict[str, Any]]) -> list[Piece]:
        """The template's text with marks for contents; with those that make what it gives without marks, if any do."""
        now = datetime.now()
        try:
            plain = self._text(messages, now)
        except _Limit:
            raise
        except UsageError:
            plain = None  # it may look into a content, and refuse what it finds there
        first: list[Piece] | None = None
        refused: UsageError | None = None
        literals = self._literals_in(messages)
        for keeps in (None, _is_assistant, bool):
            if keeps is not None and (not literals or plain is None):
                break
            try:
                pieces = self._marked(messages, literals if keeps else [], keeps or bool, now, first or [])
            except UsageError as error:
                refused = refused or error
                continue
            pieces = self._followed(pieces, plain) if plain is not None else pieces
            if first is not None and _exceeds(pieces, first, literals):
                continue
            first = first or pieces
            if "".join(piece.text for piece in pieces) == plain:
                first = pieces
                break
        if first is None:
            assert refused is not None
            raise refused
        self._check(messages, first)
        return first

    def _marked(
        self,
        messages: list[dict[str, Any]],
        literals: list[str],
        keeps: Callable[[Any], bool],
        now: datetime,
        known: list[Piece],
    ) -> list[Piece]:
        marks, bare = Marks(literals, keeps), Marks(literals, keeps, trim=True)
        with_space, without = marks.messages(messages), bare.messages(messages)
        text = self._text(with_space, now, size(messages))
        trimmed = None
        if with_space != without:
            try:
                trimmed = self._text(without, now, size(messages))
            except UsageError:
                trimmed = None
        return merged(marks.cut(text, trimmed, known))

    def _text(self, messages: list[dict[str, Any]], now: datetime, n_input: int | None = None) -> str:
        """Rendered text."""
        try:
            return self._fill(messages, now, size(messages) if n_input is None else n_input, self._nothing)
        except Exception as error:  # whatever a model's own template raises
            kind = _Limit if isinstance(error, TemplateLimit) else UsageError
            raise kind(
                f"The chat template of {self.name} refuses the conversation: {_reason(error)}; {_PLAIN_TEXT}."
            ) from error

    def _fill(self, messages: list[dict[str, Any]], now: datetime, n_input: int, nothing: Mapping[str, Any]) -> str:
        self._env.begin(n_input, now)
        if "datetime" in nothing:
            nothing = {**nothing, "datetime": now.strftime("%b %d %Y")}
        variables = {"messages": messages, "add_generation_prompt": True, **nothing, **self._specials}
        return self._env.render(self._template, variables)

    def _literals_in(self, messages: list[dict[str, Any]]) -> list[str]:
        """Literals that the template looks for, and that a message has."""
        everything = json.dumps(messages, ensure_ascii=False, default=str)
        return [text for text in self._literals if json.dumps(text, ensure_ascii=False)[1:-1] in everything]

    def _followed(self, pieces: list[Piece], plain: str) -> list[Piece]:
        """Pieces with contents written as the template wrote them, if that makes ``plain``; else as they are."""
        out, at = [], 0
        for i, piece in enumerate(pieces):
            after = pieces[i + 1].text if i + 1 < len(pieces) and pieces[i + 1].control else ""
            for text in _forms(piece):
                if plain.startswith(text, at) and plain.startswith(after, at + len(text)):
                    break
            else:
                return pieces
            out.append(Piece(text, piece.control, piece.message, piece.path))
            at += len(text)
        return out if at == len(plain) else pieces

    def _check(self, messages: list[dict[str, Any]], pieces: list[Piece]) -> None:
        if any(STEM in piece.text.casefold() for piece in pieces if piece.control):
            raise UsageError(f"The chat template of {self.name} alters the texts that it is given; {_PLAIN_TEXT}.")
        last = len(messages) - 1
        if messages[last]["role"] == "user" and all(piece.message != last for piece in pieces):
            raise UsageError(f"The chat template of {self.name} leaves out the text; {_PLAIN_TEXT}.")


class _Limit(UsageError):
    """A template that takes too much would do so again: nothing else is tried."""


def _say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _forms(piece: Piece) -> list[str]:
    if piece.control:
        return [piece.text]
    out = []
    for form in _FORMS:
        try:
            out.append(form(piece.text))
        except ValueError:
            continue
    return out


def _exceeds(pieces: Sequence[Piece], base: Sequence[Piece], literals: Sequence[str]) -> bool:
    """Whether the template's own text has more of the literals than without those of messages."""
    text, base_text = (" ".join(piece.text for piece in some if piece.control) for some in (pieces, base))
    return any(text.count(literal) > base_text.count(literal) for literal in literals)


_SIGN = re.compile(r"[^\w\s]")


def _looked_for(tree: nodes.Template) -> list[str]:
    """Constants that a template compares with, splits at, or assigns: tags such as ``</think>``."""
    found: set[str] = set()
    for node in tree.find_all((nodes.Call, nodes.Compare, nodes.Filter, nodes.Assign)):
        for const in node.find_all(nodes.Const):
            text = const.value.strip() if isinstance(const.value, str) else ""
            if 3 <= len(text) <= 64 and _SIGN.search(text):
                found.add(text)
    return sorted(found)
