"""The context of a batch: as large as its longest document needs, without reading more of them than need be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlocal.batch import documents as listed
from kvlocal.batch.batch import batch_config
from kvlocal.batch.documents import Document, Fields, read_documents
from kvlocal.batch.prompt import Frame, Prompt
from kvlocal.engine.config import EngineConfig
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget

CONFIG = EngineConfig(Path("m.gguf"), make_policy("ladder"), Budget.parse("2048"))


class Words(Prompt):
    """A prompt in words: nothing before a document, nothing after it."""

    def frame(self, model: Any) -> Frame:
        return Frame([], [])

    def tokens(self, model: Any, document: Document, frame: Frame) -> list[int]:
        return [0] * len(document.text.split(model.by))


def n_ctx(documents: Any, *, by: str | None = None, trained: int = 8192) -> int:
    model: Any = SimpleNamespace(n_ctx_train=trained, by=by)
    return batch_config(CONFIG, model, Words(), documents, 100, 1).n_ctx


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 300), ("b", 1000), ("c", 20), ("d", 2)):
        Path(f"{name}.txt").write_text("x " * n)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    text = listed._text
    monkeypatch.setattr(listed, "_text", lambda path: (names.append(path.name), text(path))[1])
    return names


def test_the_context_is_what_the_longest_needs(folder: Path, read: list[str]) -> None:
    assert n_ctx(read_documents(["."], Fields())) == 1280
    assert read == ["b.txt"], "the others have fewer bytes than that has tokens"


def test_a_small_document_may_have_more_tokens_than_a_large_one(folder: Path) -> None:
    Path("b.txt").write_text("x" * 4000)
    assert n_ctx(read_documents(["."], Fields())) == 512
    assert n_ctx([Document("a", "a", "x " * 300), Document("b", "b", "x" * 4000)]) == 512


def test_nothing_more_is_read_beyond_what_the_model_was_trained_for(folder: Path, read: list[str]) -> None:
    assert n_ctx(read_documents(["."], Fields()), trained=256) == 256
    assert read == ["b.txt"]


def test_documents_that_cannot_be_read_need_nothing(folder: Path) -> None:
    Path("b.txt").write_bytes(b"\xff" * 9000)
    assert n_ctx(read_documents(["."], Fields())) == 512
