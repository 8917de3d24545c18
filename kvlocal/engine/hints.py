"""What to do about a prompt that does not fit, and what to know of a context that is too long: only what works."""

from __future__ import annotations


def prompt_hint(
    needed: int, *, n_ctx: int, n_ctx_train: int, chunked: bool, policy_evicts: bool, keeps_all: bool, chunk_fits: bool
) -> str:
    """How a sequence of ``needed`` tokens would fit.

    Args:
        needed: tokens of the prompt and of what stays before it.
        n_ctx: tokens that the cache has room for now; n_ctx_train: that the model was trained for.
        chunked: whether the prompt was to be read in chunks; policy_evicts: whether the policy ever evicts;
            keeps_all: whether the budget is everything; chunk_fits: whether budget and chunk fit into the context.
    """
    larger = f"use a larger context (-c {needed + 1} or more)"
    if needed >= n_ctx_train:
        larger = f"the model was trained for {n_ctx_train} tokens; to go beyond, {larger}"
    # chunks need room for the budget only, but their positions go no further than the model's or the context's
    if chunked or needed >= max(n_ctx, n_ctx_train) or not chunk_fits:
        return larger
    if not policy_evicts:
        return f"{larger}, or a policy that evicts with --prefill chunked"
    if keeps_all:
        return f"{larger}, or a budget below 100% with --prefill chunked"
    return f"use --prefill chunked, which needs room only for the budget, or {larger.removeprefix('use ')}"


def beyond_training(n_ctx: int, n_ctx_train: int) -> str | None:
    """A warning about a context that is larger than what the model was trained for, ``None`` if it is not."""
    if n_ctx <= n_ctx_train:
        return None
    return (
        f"The context of {n_ctx:,} tokens is larger than the {n_ctx_train:,} that the model was trained for: beyond "
        "these, answers may make no sense."
    )
