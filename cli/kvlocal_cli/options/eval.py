"""Options of `kvlocal eval`, and what they are gathered into."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from kvlocal.errors import UsageError
from kvlocal_cli.commands.bench import Names, Sizes, Wholes
from kvlocal_cli.options import completers
from kvlocal_cli.options.settings import Callback, Decorator, Settings, Whole, count, option, stack, sweep_options

MAX_PARALLEL = 255
"""llama.cpp's most sequences, less the one that holds the text."""


class Lengths(Wholes):
    """`1024,2048` as a tuple of numbers of tokens."""

    def item(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        length = super().item(text, param, ctx)
        if length < 1:
            self.fail(f"'{text}' is not a length: it must be at least 1 token.", param, ctx)
        return length


class Shares(Names):
    """`0,0.5,1` as a tuple of numbers from 0 to 1."""

    numbers = True

    def item(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"'{text}' is not a number from 0 to 1.", param, ctx)
        return share


@dataclass(frozen=True)
class Common:
    """What all evaluations take, as it was typed."""

    settings: Settings
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    storages: tuple[str, ...]
    prefills: tuple[Literal["exact", "chunked"], ...]
    n_chunk: int
    guides: tuple[int, ...]
    parallel: int
    f32: bool
    fresh: bool
    form: Literal["md", "json", "csv"]
    output_file: Path | None
    plot: Path | None


_COMMON = stack(
    option(
        "KV cache",
        "--policy",
        "policies",
        type=Names(),
        shell_complete=completers.policies,
        default="streaming,snapkv,ada-snapkv",
        metavar="NAME,…",
        help="full: llama.cpp's own cache; paged: ours with nothing evicted, to compare scores with; else as in "
        "`kvlocal policies`.",
    ),
    option(
        "KV cache",
        "--budget",
        "budgets",
        type=Sizes(),
        shell_complete=completers.budgets,
        default="50%,25%",
        metavar="SIZE,…",
        help="How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of what was read) or 512MiB.",
    ),
    option(
        "KV cache",
        "--kv",
        "storages",
        type=Names(),
        default="f16",
        shell_complete=completers.storages,
        metavar="TYPE,…",
        help="How it is stored.",
    ),
    option(
        "KV cache",
        "--prefill",
        "prefills",
        type=Names("exact", "chunked"),
        default="exact",
        metavar="MODE,…",
        help="exact: evict once, after all that is read; chunked: after every chunk of it.",
    ),
    count("KV cache", "--chunk", "n_chunk", default=512, minimum=1, help="Tokens per chunk of --prefill chunked."),
    option(
        "KV cache",
        "--guide",
        "guides",
        type=Wholes(),
        default="0",
        metavar="N,…",
        help="With --prefill chunked: the last N tokens (the question) decide what every chunk leaves.",
    ),
    count(
        "KV cache",
        "--evict-every",
        default=32,
        minimum=1,
        help="Tokens that what follows may exceed the budget by until it is evicted again; 1: at every token.",
    ),
    sweep_options,
    option(
        "Model",
        "--f32/--as-is",
        "f32",
        default=None,
        show_default=False,
        help="Weights as F32, in a copy that is written once and kept (4 bytes per weight), or as the file has them; "
        "without either, F32 for the default model, and a MODEL as it is. On quantized weights, kernels that do the "
        "same differ by a KL of about .003.",
    ),
    count("Model", "-c", "--ctx-size", "n_ctx", default=0, minimum=0, help="Context; 0: what the longest case needs."),
    option(
        "Model",
        "--parallel",
        type=Whole(min=1, max=MAX_PARALLEL),
        default=16,
        metavar="N",
        help="Variants that are decoded together (kld: one); more is faster and takes more memory.",
    ),
    option(
        "Output",
        "--fresh",
        is_flag=True,
        help="Measure again what is on record; without it, a run goes on where an earlier one stopped.",
    ),
    option(
        "Output",
        "-o",
        "--output",
        "form",
        type=click.Choice(["md", "json", "csv"]),
        default="md",
        help="What is printed.",
    ),
    option("Output", "--output-file", type=click.Path(path_type=Path), metavar="FILE", help="Not to standard output."),
    option(
        "Output", "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it too: FILE.svg or FILE.png."
    ),
)


def common_options(command: Callback) -> Callback:
    """What all evaluations take, gathered into `common`."""
    names = Common.__dataclass_fields__

    @functools.wraps(command)
    def gather(**options: Any) -> Any:
        values = {name: options.pop(name) for name in names}
        if values["f32"] is None:
            values["f32"] = values["settings"].model is None
        return command(common=Common(**values), **options)

    return _COMMON(gather)


def question_option(default: str) -> Decorator:
    """--question, as a tuple of modes."""

    def modes(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
        return ("inside", "after") if value == "both" else (value,)

    return option(
        "Cases",
        "--question",
        "questions",
        type=click.Choice(["inside", "after", "both"]),
        default=default,
        callback=modes,
        help="inside: the eviction sees the question; after: it saw only the document, which is what a second question "
        "in a chat meets.",
    )


def text_options(n_context: int, n_continue: int, per_text: int) -> Decorator:
    """--text and how excerpts are taken from it, gathered into `source`."""
    options = stack(
        option(
            "Cases",
            "--text",
            "texts",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            multiple=True,
            required=True,
            metavar="FILE",
            help="A UTF-8 text, longer than an excerpt; may be repeated.",
        ),
        count("Cases", "--context", "n_context", default=n_context, minimum=1, help="Tokens that are read first."),
        # its first token is not predicted
        count(
            "Cases", "--continue", "n_continue", default=n_continue, minimum=2, help="Tokens that are then predicted."
        ),
        count("Cases", "--contexts", "per_text", default=per_text, minimum=1, help="Excerpts of every text."),
    )

    def decorate(command: Callback) -> Callback:
        @functools.wraps(command)
        def gather(texts: tuple[Path, ...], n_context: int, n_continue: int, per_text: int, **others: Any) -> Any:
            twice = [stem for stem, n in Counter(path.stem for path in texts).items() if n > 1]
            if twice:
                raise UsageError(f"two texts are named '{twice[0]}', by which results are listed; rename one of them.")
            source = {"texts": texts, "n_context": n_context, "n_continue": n_continue, "per_text": per_text}
            return command(source=source, **others)

        return options(gather)

    return decorate


def data_options(kind: Literal["FILE", "DIR"], help: str) -> Decorator:
    """--data and --rows."""
    path = click.Path(path_type=Path, exists=True, file_okay=kind == "FILE", dir_okay=kind == "DIR")
    data = option("Cases", "--data", type=path, required=True, metavar=kind, help=help)
    rows = count("Cases", "--rows", default=0, minimum=0, help="Rows of every file, from the first; 0: all.")
    return lambda command: data(rows(command))
