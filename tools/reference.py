"""Writes docs/reference, a page for every command from what `--help` says, the table of docs/configuration.md, and
docs/architectures.md from the table that the tests of all architectures go by.

    python tools/reference.py

Tests compare the pages with what they are written from. MkDocs loads this file as well, so that its
navigation has all pages.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = "reference"
WIDTH = 100
COMMAND = "python tools/reference.py"
BEGIN = f"<!-- Written by `{COMMAND}` from the settings; do not edit. -->"
END = "<!-- The end of what is written. -->"


def pages() -> dict[str, str]:
    """Text by file name."""
    import click
    from kvlocal_cli.main import main

    def section(level: int, name: str, command: click.Command, parent: click.Context) -> str:
        ctx = click.Context(command, info_name=name, parent=parent)
        text = f"{'#' * level} {ctx.command_path}\n\n```text\n{command.get_help(ctx)}\n```\n"
        below = command.commands.items() if isinstance(command, click.Group) else ()
        return "\n".join([text, *(section(level + 1, *each, ctx) for each in below)])

    root = click.Context(main, info_name="kvlocal", terminal_width=WIDTH, **main.context_settings)
    note = f"<!-- Written by `{COMMAND}` from --help; do not edit. -->\n\n"
    out = {f"{name}.md": note + section(1, name, command, root) for name, command in main.commands.items()}
    rows = (
        f"| [`{root.command_path} {name}`]({name}.md) | {command.get_short_help_str(200)} |"
        for name, command in sorted(main.commands.items())
    )
    table = "\n".join(["| command | |", "|---|---|", *rows])
    out["index.md"] = f"{note}# Commands\n\n{table}\n\n```text\n{main.get_help(root)}\n```\n"
    return out


def table() -> str:
    """The settings, a row each."""
    from kvlocal.settings import SETTINGS

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = ["| option | variable | key | Python | default | |", "|---|---|---|---|---|---|"]
    for setting in SETTINGS:
        default = "" if setting.default is None or setting.default is False else f"{setting.default}"
        flags = ", ".join(f"`{flag}`" for flag in setting.flags)
        keyword = f"`{setting.keyword}`" if setting.keyword else ""
        names = f"{flags} | `{setting.variable}` | `{setting.key}` | {keyword}"
        rows.append(f"| {names} | {default} | {cell(setting.help)} |")
    return "\n".join(rows)


def configuration(text: str) -> str:
    """The page with the table as it is now."""
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n\n{table()}\n\n{text[after:]}"


def architectures() -> str:
    """Which architectures are served, by their kind of memory."""
    sys.path.insert(0, str(DOCS.parent / "tests" / "helpers"))
    from arch_table import GROUPS, SERVED, TABLE

    def rows(group: str) -> list[str]:
        known: dict[str, list[str]] = {}
        for arch in TABLE:
            if arch.group == group:
                known.setdefault(arch.name, []).extend([arch.known] if arch.known else [])
        return [f"| `{name}` | {', '.join(models)} |" for name, models in sorted(known.items())]

    def section(group: str) -> str:
        return "\n".join(
            [f"### {group}", "", f"{GROUPS[group]}.", "", "| architecture | models |", "|---|---|", *rows(group)]
        )

    n_all = len({arch.name for arch in TABLE})
    n_served = len({arch.name for arch in TABLE if arch.served})
    n_made = len({arch.name for arch in TABLE if arch.served and arch.made})
    others = "\n\n".join(section(group) for group in GROUPS if group not in SERVED)
    return f"""<!-- Written by `{COMMAND}` from tests/helpers/arch_table.py; do not edit. -->

# Which models are served

A GGUF file names its architecture. llama.cpp knows {n_all}; the paged cache serves {n_served}. For {n_made} a tiny
random model is made by the tests, and the logits of the paged cache are compared with those of llama.cpp's own, with
page kernels and with stock operators, for one token at a time and for batches shorter and longer than the window
(`python -m pytest tests/native/model/test_architectures.py`).

What a budget bounds are the *open* layers: those whose cache grows with the text. Sliding windows and recurrent
states do not grow; their bytes are shown apart (`kv.fixed_bytes`), and come first in a budget in bytes. `--kv-swa q8`
stores windows in about half the bytes. They cannot be cut back at will: `/undo` and `/regen` return to the last two
places that were marked, an edit further back reads the text again. Policies that renumber tokens (`positions=rolled`)
are refused there. Images and drafts (MTP) are not used.

## Served

{chr(10).join(chr(10) + section(group) for group in SERVED).strip()}

## Refused by name

`--policy full` runs those that are decoders of text on llama.cpp's own cache.

{others}
"""


def on_config(config: Any) -> Any:
    """MkDocs: the pages of all commands below the entry of the navigation that names the first of them."""
    names = sorted(path.name for path in (DOCS / FOLDER).glob("*.md"))
    for entry in config.nav:
        for title, value in entry.items():
            if value == [f"{FOLDER}/index.md"]:
                others = [{name.removesuffix(".md"): f"{FOLDER}/{name}"} for name in names if name != "index.md"]
                entry[title] = [*value, *others]
    return config


def main() -> None:
    folder = DOCS / FOLDER
    folder.mkdir(exist_ok=True)
    wanted = pages()
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, "utf-8")
    (DOCS / "architectures.md").write_text(architectures(), "utf-8")
    page = DOCS / "configuration.md"
    page.write_text(configuration(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
