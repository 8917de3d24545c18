"""`kvlocal plan`: what a run will take, before it takes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from kvlocal.errors import UsageError
from kvlocal.settings import POLICY, SETTINGS, STORED_POLICY
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.options.click_types import Whole
from kvlocal_cli.options.option import GroupedCommand, option
from kvlocal_cli.options.output import json_option
from kvlocal_cli.options.settings import Settings, engine_options, n_prompt_option, parallel_option
from kvlocal_cli.render.controls import plain, plain_json

_NAMES = (
    *("n_ctx", "budget", "storage", "storage_tail", "prefill", "chunk", "guide", "evict_every"),
    *("n_batch", "n_ubatch", "n_threads", "n_gpu_layers", "kernels"),
)
"""The settings that a suggested command line repeats, in its order."""

_FLAGS = {setting.name: setting.flags[0] for name in _NAMES for setting in SETTINGS if setting.name == name}


@click.command(cls=GroupedCommand)
@n_prompt_option("Run", "Tokens of the prompt; 0: what the context holds.", default=0)
@option(
    "Run",
    "--generate",
    "n_generate",
    type=Whole(min=0),
    metavar="N",
    help="Tokens of the answer.  [default: 512, or a quarter of the context if that is less]",
)
@parallel_option(1, "Sequences that do so in one cache, each with its own context.")
@engine_options
@option("Run", "--memory", metavar="SIZE", help="Plan for a machine that has so much memory free, such as 16GiB.")
@json_option
def plan(
    settings: Settings,
    n_prompt: int,
    n_generate: int | None,
    parallel: int,
    memory: str | None,
    as_json: bool,
) -> None:
    """Say what a run will take, before anything is allocated.

    The model's file is read but for its weights, and the run is rehearsed: the cache takes the pages that the run would
    take, the policy evicts by made-up scores, and nothing is computed. Weights, cache and buffers are what the library
    itself counts. It also says on which devices the pages lie, and what reads them there.

    Memory counts as what is available now: this process already has what the program takes beside these. Not in the
    total is what an eviction takes for a moment, up to 64 MiB and the scores of one layer.

    The exit code is 0 if the run fits, and 1 if it does not; then options follow with which it would.

    \b
    kvlocal plan -c 8192 --policy full
    kvlocal plan model.gguf -c 32768 --policy ladder --budget 2048 --prefill chunked
    kvlocal plan model.gguf -c 4096 --kv q4 --parallel 8 --memory 16GiB --json
    """
    from kvlocal_cli.render.plan import plan_view
    from kvlocal_cli.render.screen import Screen, out

    figures = backend.plan_run(
        settings,
        n_prompt=n_prompt,
        n_generate=n_generate,
        parallel=parallel,
        memory=None if memory is None else memory_bytes(memory),
        screen=Screen(),
    )
    changes = figures.pop("suggestion")
    command = suggested(settings, changes, figures, parallel) if changes else None
    if as_json:
        click.echo(plain_json(json.dumps({**figures, "suggestion": command}, ensure_ascii=False, allow_nan=False)))
    else:
        out(*plan_view(figures, helps=command is not None))
        if command is not None:
            click.echo(plain(command))  # whole, however wide the terminal is
    if not figures["fits"]:
        raise click.exceptions.Exit(1)


def suggested(settings: Settings, changes: Mapping[str, Any], figures: Mapping[str, Any], parallel: int) -> str:
    """The command line that changes this much; several sequences can only be planned."""
    if "policy" in changes and changes["policy"] != settings.policy:
        settings = replace(settings, policy_args={})
    settings = replace(settings, **changes)
    words = ["kvlocal", "run" if parallel == 1 else "plan", *([settings.model] if settings.model else [])]
    default = POLICY.default if settings.storage == "f16" else STORED_POLICY
    if settings.policy != default:
        words += ["--policy", settings.policy]
    for name, value in settings.policy_args.items():
        words += ["--policy-arg", f"{name}={value}"]
    plain = Settings()
    for name, flag in _FLAGS.items():
        if getattr(settings, name) != getattr(plain, name):
            words += [flag, str(getattr(settings, name))]
    if parallel > 1:
        words += ["--n-prompt", str(figures["n_prompt"]), "--generate", str(figures["n_generate"])]
        words += ["--parallel", str(parallel)]
    return shlex.join(words)


def memory_bytes(text: str) -> int:
    """What --memory says, in bytes."""
    from kvlocal.storage.budget import Budget

    budget = Budget.parse(text)
    if budget.unit != "bytes":
        raise UsageError(f"--memory '{text}' is not a size: give bytes, such as 16GiB or 800MB.")
    return int(budget.value)
