"""What is advised when a prompt does not fit: never what would be refused too."""

from __future__ import annotations

from typing import Any

import pytest

from kvlocal.engine.hints import beyond_training, prompt_hint

CHUNKED = "use --prefill chunked, which needs room only for the budget, or a larger context (-c 3001 or more)"


def hint(needed: int, **changes: Any) -> str:
    now = {"n_ctx": 1024, "n_ctx_train": 4096, "chunked": False, "policy_evicts": True, "keeps_all": False}
    return prompt_hint(needed, **(now | {"chunk_fits": True} | changes))


def test_chunks_are_advised_where_they_help() -> None:
    assert hint(3000) == CHUNKED
    assert hint(3000, n_ctx=2000, n_ctx_train=1000).startswith("the model was trained for 1000")


@pytest.mark.parametrize(
    ("needed", "now"),
    [
        (4096, {}),  # positions end where the training did
        (10_016, {}),
        (10_016, {"policy_evicts": False}),
        (3000, {"chunk_fits": False}),
        (3000, {"chunk_fits": False, "policy_evicts": False}),
        (5000, {"chunked": True}),
    ],
)
def test_chunks_are_not_advised_where_they_would_be_refused(needed: int, now: dict[str, bool]) -> None:
    said = hint(needed, **now)
    assert "chunked" not in said and f"use a larger context (-c {needed + 1} or more)" in said
    assert ("trained for 4096 tokens" in said) == (needed >= 4096)


def test_what_must_be_changed_beside_the_prefill_is_named() -> None:
    assert hint(3000, policy_evicts=False).endswith("or a policy that evicts with --prefill chunked")
    assert hint(3000, keeps_all=True).endswith("or a budget below 100% with --prefill chunked")


def test_a_context_beyond_the_training_is_a_warning() -> None:
    assert beyond_training(4096, 4096) is None
    said = beyond_training(12_000, 4096)
    assert said is not None and "12,000" in said and "4,096" in said
