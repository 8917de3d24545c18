"""Long texts are tokenized in parts: with the tokens of the whole, in time that grows with the length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygguf import write_model

from kvlocal.native.cuts import PART, Cuts
from kvlocal.native.model import Model

TINY = Path(__file__).parents[2] / "fixtures" / "kvlocal-tiny-q8_0.gguf"
PIECES = [
    "\n",
    " ",
    "  ",
    "\t",
    "the ",
    "river",
    "中",
    "文",
    "é",
    "<s>",
    "</s>",
    "<|im_end|>",
    "x",
    ".",
    "48213",
    "\x02",
    "\u2581",
]


@pytest.fixture(scope="module", params=["trained", "with a space before a text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = TINY
    if request.param != "trained":
        path = write_model(
            tmp_path_factory.mktemp("model") / "m.gguf", "llama", n_head=2, n_head_kv=1, head_dim=32
        ).path
    found = Model(path, no_alloc=True)
    yield found
    found.close()


def test_a_cut_is_where_no_token_holds_both_characters() -> None:
    cuts = Cuts(["ab", "bc", "\u2581a", "d"])
    assert cuts.split("abcd", 1) == ["abc", "d"]
    assert cuts.split("a a a", 1) == ["a", " a", " a"]
    assert cuts.split("dddd", 2) == ["dd", "dd"]
    assert cuts.split("abab" * 3, 100) == ["abab" * 3]
    assert cuts.split("", 1) == [""]


@given(text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join), size=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_parts_have_the_tokens_of_the_whole(model: Model, text: str, size: int) -> None:
    cuts = model._cuts
    assert cuts is not None
    first, *rest = cuts.split(text, size)
    assert first + "".join(rest) == text
    parts = [model._encode(first, False), *(model._encode(part, False, joined=True) for part in rest)]
    assert [token for part in parts for token in part] == model._encode(text, False)


def test_half_a_million_line_breaks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    tokenize = model.llama.llama_tokenize

    def counted(vocab: Any, data: bytes, *how: Any) -> int:
        longest.append(len(data))
        return int(tokenize(vocab, data, *how))

    monkeypatch.setattr(model.llama, "llama_tokenize", counted)
    n = 500_000
    for unit in ("\n", "\t"):
        tokens = model.tokenize(unit * n, add_special=False, parse_special=False)
        # perhaps with one for the space before it
        assert tokens[-n:] == [tokens[-1]] * n and len(tokens) <= n + 1
    assert max(longest) <= PART + 1, "never much at once"
