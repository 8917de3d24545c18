"""Where a long text may be cut so that its parts have the tokens of the whole.

SentencePiece builds a token out of characters that stand side by side, so none reaches over two characters that no
token of the vocabulary holds side by side. llama.cpp takes time in the square of the length for characters that have no
token of their own (500,000 line breaks: half a minute); in parts it does not.
"""

from __future__ import annotations

from collections.abc import Iterable

PART = 4096
"""Characters that a part has at least, but for the last one."""


class Cuts:
    """The pairs of characters that tokens hold."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """``tokens``: texts of all tokens of the vocabulary, with U+2581 for a space."""
        self._pairs = {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}

    def split(self, text: str, size: int = PART) -> list[str]:
        """Parts that make up the text, cut at the first place after ``size`` characters that allows it."""
        out, start = [], 0
        while len(text) - start > size:
            end = next((i for i in range(start + size, len(text)) if self._allowed(text[i - 1 : i + 1])), None)
            if end is None:
                break
            out.append(text[start:end])
            start = end
        return [*out, text[start:]]

    def _allowed(self, pair: str) -> bool:
        return pair.replace(" ", "\u2581") not in self._pairs
