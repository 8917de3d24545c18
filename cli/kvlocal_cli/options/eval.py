"""Options of `kvlocal eval`, and what they are gathered into."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from kvlocal import settings
from kvlocal.errors import UsageError
from kvlocal_cli.options import completers
from kvlocal_cli.options.option import Callback, Decorator, count, declared, declared_list, option, stack
from kvlocal_cli.options.output import table_options
from kvlocal_cli.options.settings import Settings, parallel_option, retrieve_lists, sweep_options


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
    retrieves: tuple[str, ...]
    retrieve_budgets: tuple[int, ...]
    archive_to: str
    recall_budgets: tuple[int, ...]
    parallel: int
    f32: bool
    fresh: bool
    form: Literal["md", "json", "csv"]
    output_file: Path | None
    plot: Path | None


_COMMON = stack(
    declared_list(
        settings.POLICY,
        "policies",
        "streaming,snapkv,ada-snapkv",
        shell_complete=completers.policies,
        help="full: llama.cpp's own cache; paged: ours with nothing evicted, to compare scores with; else as in "
        "`kvlocal policies`.",
    ),
    declared_list(
        settings.BUDGET,
        "budgets",
        "50%,25%",
        shell_complete=completers.budgets,
        help="How much is kept: 1024 (tokens per KV head and layer, on average), 25% (of what was read) or 512MiB.",
    ),
    declared_list(settings.KV, "storages", "f16", shell_complete=completers.storages, help="How it is stored."),
    declared_list(
        settings.PREFILL,
        "prefills",
        "exact",
        metavar="MODE",
        help="exact: evict once, after all that is read; chunked: after every chunk of it.",
    ),
    declared(settings.CHUNK, name="n_chunk"),
    declared_list(
        settings.GUIDE,
        "guides",
        "0",
        help="With --prefill chunked: the last N tokens (the question) decide what every chunk leaves.",
    ),
    retrieve_lists,
    declared(
        settings.ARCHIVE,
        name="archive_to",
        help="Also with what is evicted on disk, from which later questions recall: auto, off, or a folder for it.",
    ),
    declared_list(settings.RECALL_BUDGET, "recall_budgets", "256"),
    declared(
        settings.EVICT_EVERY,
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
    declared(settings.N_CTX, help="Context; 0: what the longest case needs."),
    parallel_option(16, "Variants decoded together (kld: one); more is faster and takes more memory.", section="Model"),
    option(
        "Output",
        "--fresh",
        is_flag=True,
        help="Measure again what is on record; without it, a run goes on where an earlier one stopped.",
    ),
    table_options,
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


def ask_option(default: str) -> Decorator:
    """--ask, as a tuple of modes."""

    def modes(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
        return ("inside", "after") if value == "both" else (value,)

    return option(
        "Cases",
        "--ask",
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
    """--data or, for a folder, --data-dir, as `data`; and --rows."""
    path = click.Path(path_type=Path, exists=True, file_okay=kind == "FILE", dir_okay=kind == "DIR")
    flag = "--data" if kind == "FILE" else "--data-dir"
    data = option("Cases", flag, "data", type=path, required=True, metavar=kind, help=help)
    rows = count("Cases", "--rows", default=0, minimum=0, help="Rows of every file, from the first; 0: all.")
    return lambda command: data(rows(command))
