"""Messages of a conversation: what is taken, and how it is fitted to what a chat template takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvlocal.errors import UsageError
from kvlocal.native.text import check_text

Message = Mapping[str, Any]
"""``role`` and ``content``, a text or a list of ``{"type": "text", "text": …}``; tool calls and the like are kept."""
Messages = Sequence[Message]

EMPTY = "The prompt is empty; give some text."
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as dictionaries of their own.

    Raises:
        UsageError: there are none, the last question is empty, or one has no role, no content, or text that is no
            Unicode.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(f"The messages are a {type(messages).__name__}; give a list of them.")
    if not messages:
        raise UsageError(EMPTY)
    out = [_message(i, message) for i, message in enumerate(messages)]
    if out[-1]["role"] == "user" and not flattened(out[-1]["content"]).strip():
        raise UsageError(EMPTY)
    return out


def flattened(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a content, parts on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content)


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def without_system(messages: list[dict[str, Any]], name: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Messages with the text of the first one, a system message, before the first question; and their old indices.

    Raises:
        UsageError: there is no question.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise UsageError(f"The chat template of {name} has no system role, and there is no question to put it before.")
    system, question = (messages[i]["content"] for i in (0, first))
    if isinstance(question, list):
        content: Any = [*as_parts(flattened(system)), *question]
    else:
        content = f"{flattened(system)}\n\n{question}"
    origin = list(range(1, len(messages)))
    return [messages[i] | {"content": content} if i == first else messages[i] for i in origin], origin


def size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(size(key) + size(item) for key, item in value.items())
    return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0


def _message(index: int, message: Message) -> dict[str, Any]:
    what = f"Message {index + 1}"
    if not isinstance(message, Mapping):
        raise UsageError(f"{what} is a {type(message).__name__}; give a dictionary with role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise UsageError(f"{what} has the role {role!r}; give a plain word such as user.")
    if isinstance(content, (list, tuple)):
        content = [_part(what, part) for part in content]
    elif content is not None or not message.get("tool_calls"):
        content = check_text(content, f"The content of message {index + 1}")
    for key, value in message.items():
        if key != "content":
            _check_all(value, f"{key} of message {index + 1}")
    return {**message, "content": content}


def _part(what: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise UsageError(f"{what} has a part of type {kind}; only text can be read.")
    return {"type": "text", "text": check_text(part.get("text"), f"A part of {what.lower()}")}


def _check_all(value: Any, what: str) -> None:
    """Texts at any depth."""
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_all(key, what)
            _check_all(item, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_all(item, what)
