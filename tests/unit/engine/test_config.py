"""What is said of models and settings that do not fit each other; ranges are in test_settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlocal.engine.config import EngineConfig, context_config
from kvlocal.errors import UsageError
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import STORAGES, Storage

REASON = "The architecture 'rwkv7' is recurrent and has no KV cache to page"


class Refused:
    """A model of llama.cpp's cache only."""

    def check_paged(self) -> None:
        raise UsageError(f"{REASON}; use --policy full, which runs it on llama.cpp's own cache.")

    def stores(self, _storage: str) -> bool:
        return True


def said(policy: str, storage: str) -> str:
    config = EngineConfig(Path("m.gguf"), make_policy(policy), Budget.parse("25%"), storage=Storage.parse(storage))
    model: Any = Refused()
    with pytest.raises(UsageError) as error:
        context_config(model, config, 512)
    return str(error.value)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_no_advice_is_what_was_given(storage: str) -> None:
    end = "which runs it on llama.cpp's own cache."
    assert said("full", storage) == f"{REASON}; leave out --kv {storage}, {end}"
    assert said("snapkv", storage) == f"{REASON}; use --policy full without --kv {storage}, {end}"


def test_the_library_advises_what_is_enough() -> None:
    assert said("snapkv", "f16").endswith("; use --policy full, which runs it on llama.cpp's own cache.")
    config = EngineConfig(Path("m.gguf"), make_policy("full"), Budget.parse("100%"))
    assert not context_config(Refused(), config, 512).paged  # type: ignore[arg-type]


class Served(Refused):
    """A model that can be paged."""

    def check_paged(self) -> None:
        pass


@pytest.mark.parametrize(
    ("policy", "storage", "sentence"),
    [
        (
            "ladder",
            "f16",
            "Policy ladder stores tokens in formats other than f16, for which the page kernels are needed; use "
            "--kernels auto, or a policy that leaves all in f16, such as ada-snapkv.",
        ),
        (
            "h2o",
            "f16",
            "Policy h2o accumulates the attention that every token receives, for which the page kernels are needed; "
            "use --kernels auto, or a policy that does not, such as ada-snapkv.",
        ),
        (
            "snapkv",
            "q4",
            "--kv q4 stores tokens in formats other than f16, for which the page kernels are needed; use "
            "--kernels auto, or leave out --kv.",
        ),
    ],
)
def test_what_needs_the_page_kernels_is_refused_without_them(policy: str, storage: str, sentence: str) -> None:
    settings = (Path("m.gguf"), make_policy(policy), Budget.parse("25%"))
    with pytest.raises(UsageError) as error:
        EngineConfig(*settings, storage=Storage.parse(storage), kernels="portable")
    assert str(error.value) == sentence
    EngineConfig(*settings, storage=Storage.parse(storage), kernels="auto")


def test_kernels_reach_the_context_of_our_own_cache_alone() -> None:
    model: Any = Served()
    for policy, kernels, portable in (
        ("snapkv", "auto", False),
        ("snapkv", "portable", True),
        ("full", "portable", False),
    ):
        config = EngineConfig(Path("m.gguf"), make_policy(policy), Budget.parse("25%"), kernels=kernels)  # type: ignore[arg-type]
        assert context_config(model, config, 512).portable is portable
