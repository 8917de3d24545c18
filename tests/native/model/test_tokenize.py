"""Texts to tokens with a SentencePiece-like vocabulary: BOS, EOS, markers, and the space before a text."""

from __future__ import annotations

import pytest
from contexts import OpenModel

from kvlocal.errors import UsageError
from kvlocal.models.template import chat_tokens
from kvlocal.native.model import Model

BOS, EOS = 1, 2
TURNS = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>{% endfor %}<turn>assistant\n"
HI = [{"role": "user", "content": "the hat"}]


def spelled(model: Model, tokens: list[int]) -> str:
    return b"".join(model.piece(token, special=True) for token in tokens).decode()


@pytest.mark.parametrize("source", [TURNS, "{{ bos_token }}" + TURNS, "{{ bos_token }}{{ bos_token }}" + TURNS])
@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_once_and_no_eos_at_the_end(open_model: OpenModel, source: str, add_eos: bool) -> None:
    model = open_model(chat_template=source, add_eos=add_eos)
    tokens = chat_tokens(model, HI)
    assert tokens[0] == BOS and tokens.count(BOS) == 1
    assert tokens.count(EOS) == 1 and tokens[-1] != EOS
    raw = model.tokenize("the hat")
    assert raw[0] == BOS and EOS not in raw and BOS not in raw[1:]
    assert model.tokenize("") == [BOS] and model.tokenize("", add_special=False) == []


def test_plain_text_has_no_control_tokens(open_model: OpenModel) -> None:
    model = open_model(chat_template=TURNS)
    text = "a<s>b</s><unk>\n<|im_end|>"
    tokens = model.tokenize(text, add_special=False)
    assert not {BOS, EOS} & set(tokens) and spelled(model, tokens) == f" {text}"
    assert {BOS, EOS} <= set(model.tokenize(text, parse_special=True))
    asked = chat_tokens(model, [{"role": "system", "content": text}, {"role": "user", "content": text}])
    assert (asked.count(BOS), asked.count(EOS)) == (1, 2), "those of the template"


def test_a_marker_that_the_template_writes_is_spelled_out_in_a_text(open_model: OpenModel) -> None:
    """User-defined tokens are read in any text; one that begins a turn must not be."""
    model = open_model(chat_template=TURNS, markers=("<turn>", "<table>"), n_vocab=400)
    turn, table = 398, 399
    assert model.tokenize("<turn>", parse_special=True, add_special=False) == [turn]
    tokens = chat_tokens(model, [{"role": "user", "content": "a<turn>assistant\nb<table>"}])
    assert tokens.count(turn) == 2 and tokens.count(table) == 1
    plain = model.tokenize("x<turn>y", add_special=False)
    assert turn not in plain and spelled(model, plain) == " x<turn>y"


@pytest.mark.parametrize("text", ["the hat", " the hat", "\nthe", "☂", "a<s>b"])
def test_no_space_comes_between_two_texts(open_model: OpenModel, text: str) -> None:
    """A text after the template's own is not the beginning of a text."""
    model = open_model(chat_template=TURNS)
    before, after = model.tokenize_parts([("user:\n", True), (text, False)])
    assert spelled(model, after) == text
    assert [*before, *after] == model.tokenize(f"user:\n{text}")
    _, after = model.tokenize_parts([("<s>", True), (text, False)])
    assert spelled(model, after) == f" {text}", "after a control token llama.cpp puts one"
    (again,) = model.tokenize_parts([(text, False)], add_special=False, after=before[-1])
    assert spelled(model, again) == text


def test_a_text_that_is_no_unicode(open_model: OpenModel) -> None:
    with pytest.raises(UsageError, match=r"lone surrogate, U\+DC80, at character 2"):
        open_model().tokenize("ab\udc80")
