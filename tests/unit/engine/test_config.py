"""What is said of a model that the paged cache cannot serve; ranges are in test_settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlocal.engine.config import EngineConfig, context_config
from kvlocal.errors import UsageError
from kvlocal.policies import make_policy
from kvlocal.storage.budget import Budget
from kvlocal.storage.storage import STORAGES, Storage

REASON = "The architecture 'gemma3' uses sliding-window attention, which the paged cache does not serve yet"


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
