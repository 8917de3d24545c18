"""Where sentences end, by the text that tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

from kvlocal.retrieval.retriever import Vocabulary

CLOSERS = "\"')]}”’»*_`"
"""What may stand between the mark that ends a sentence and its end."""
MARKS = (".", "!", "?", "。", "！", "？")

LITERAL = (".", "!", "?", ". ", "! ", "? ", "...", "\n\n", "\n\n\n", "。", "！", "？", "。。")
"""The delimiters of the authors' code, which it looks up among the vocabulary's entries as they are."""


def ends_sentence(piece: str) -> bool:
    """Whether a sentence may end with this token's text."""
    return piece.count("\n") >= 2 or piece.rstrip().rstrip(CLOSERS).endswith(MARKS)


def sentence_ends(tokens: Sequence[int], vocabulary: Vocabulary, *, least: int, most: int) -> list[int]:
    """Ends of sentences of ``least`` to ``most`` tokens: a shorter one goes on into the next, a longer one is cut.

    A full stop between digits ends none. An end is given once the token behind it is there.
    """
    out: list[int] = []
    begin = 0
    for i in range(1, len(tokens)):
        n = i - begin
        piece = vocabulary.piece(tokens[i - 1])
        closes = n >= least and ends_sentence(piece)
        if closes and piece == "." and vocabulary.piece(tokens[i])[:1].isdigit():
            closes = False
        if closes or n >= most:
            out.append(i)
            begin = i
    return out


def literal_ends(tokens: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Ends as the authors' code finds them: behind every token whose vocabulary entry is one of :data:`LITERAL`."""
    return [i for i in range(1, len(tokens)) if vocabulary.entry(tokens[i - 1]) in LITERAL]
