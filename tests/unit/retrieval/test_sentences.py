"""Where units of a text end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlocal.retrieval import make_retriever
from kvlocal.retrieval.sentences import ends_sentence, literal_ends, sentence_ends


class Words:
    """A vocabulary whose tokens are the given texts, by number."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def piece(self, token: int) -> str:
        return self.texts[token]

    def entry(self, token: int) -> str:
        return self.texts[token]


def ids(*texts: str) -> tuple[list[int], Words]:
    return list(range(len(texts))), Words(*texts)


@pytest.mark.parametrize(
    ("piece", "ends"),
    [
        (".", True), ("!", True), ("?", True), (" end.", True), ('."', True), (".)", True), ("?!", True), (").", True),
        (".\n", True), (".\n\n", True), ("\n\n", True), ("\n", False), ("。", True), ("！”", True), ("...", True),
        (",", False), ("word", False), (" ", False), ("", False), ("3.14", False), ("*", False), (".**", True),
    ],
)  # fmt: skip
def test_a_sentence_ends_by_the_text_of_a_token(piece: str, ends: bool) -> None:
    assert ends_sentence(piece) is ends


def test_a_full_stop_between_digits_ends_nothing() -> None:
    text = ["It", " is", " about", " 3", ".", "14", " metres", " long", ".", " Then"]
    assert sentence_ends(*ids(*text), least=4, most=64) == [9]


def test_a_short_sentence_goes_on_into_the_next() -> None:
    text = ["No", ".", " It", " is", " not", ".", " So"]
    assert sentence_ends(*ids(*text), least=4, most=64) == [6]
    assert sentence_ends(*ids(*text), least=1, most=64) == [2, 6]


def test_an_end_waits_for_the_token_behind_it() -> None:
    """What comes next may be a digit."""
    text = ["It", " is", " now", " 3", "."]
    assert sentence_ends(*ids(*text), least=4, most=64) == []
    assert sentence_ends(*ids(*text, "14"), least=4, most=64) == []
    assert sentence_ends(*ids(*text, " Yes"), least=4, most=64) == [5]


@given(st.lists(st.sampled_from(["a", ".", "1", "\n\n", "?"]), max_size=300), st.integers(1, 300))
def test_units_are_bounded_and_do_not_depend_on_how_the_text_comes(text: list[str], cut: int) -> None:
    tokens, words = ids(*text)
    whole = sentence_ends(tokens, words, least=4, most=64)
    sizes = [end - begin for begin, end in zip([0, *whole], whole, strict=False)]
    assert all(4 <= size <= 64 for size in sizes)
    assert len(tokens) - (whole[-1] if whole else 0) <= 64
    first = sentence_ends(tokens[:cut], words, least=4, most=64)
    begin = first[-1] if first else 0
    rest = [begin + end for end in sentence_ends(tokens[begin:], words, least=4, most=64)]
    assert first + rest == whole


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ([9, 8, 1, 7, 6, 1, 5, 5], [3, 6]),
        ([9, 8, 1], []),
        ([9, 8, 1, 4], [3]),
        ([1, 1, 9], [1, 2]),
        ([9, 9], []),
    ],
)
def test_the_authors_delimiters_close_their_sentence(text: Sequence[int], ends: list[int]) -> None:
    """Worked example U1 with token 1 as the delimiter; what ends at the last token is open still."""
    words = Words("x", ".", "x", "x", "x", "x", "x", "x", "x", "x")
    assert literal_ends(text, words) == ends


def test_pages_have_one_size() -> None:
    quest = make_retriever("quest")
    assert quest.ends([0] * 40, Words("x")) == [16, 32]
    assert quest.ends([0] * 32, Words("x")) == [16]
