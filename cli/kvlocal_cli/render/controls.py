"""Text of models, files and templates without what a terminal would obey."""

from __future__ import annotations

import re

# C0 but \t and \n, DEL, C1: without them no escape sequence begins, however it is split over pieces of a stream
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """The text without control characters but \\n and \\t."""
    return _CONTROLS.sub("", text)


def plain_json(text: str) -> str:
    """JSON that means the same and holds no control characters: DEL and C1 are escaped as C0 is already."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
