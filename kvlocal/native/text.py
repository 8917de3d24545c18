"""What is taken as text."""

from __future__ import annotations

from typing import Any

from kvlocal.errors import UsageError


def check_text(text: Any, what: str) -> str:
    """``text``, if it is one.

    Raises:
        UsageError: it is something else, or has lone surrogates, which cannot be written as UTF-8.
    """
    if not isinstance(text, str):
        raise UsageError(f"{what} is a {type(text).__name__}; give a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}, which is no "
            "Unicode text; take it out."
        ) from None
    return text
