"""`kvlocal kv-map`: how every layer and head holds the tokens of a prompt, as text or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvlocal.errors import KVError, UsageError
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.backend.cache import read_rungs
from kvlocal_cli.commands.run import prompt_options, prompt_tokens, read_prompt
from kvlocal_cli.options.option import GroupedCommand
from kvlocal_cli.options.settings import Settings, engine_options
from kvlocal_cli.terminal import prompt
from kvlocal_cli.terminal.echo import NoEcho
from kvlocal_cli.terminal.interrupt import Interrupt

if TYPE_CHECKING:
    from kvlocal.engine.engine import Engine
    from kvlocal_cli.render.heads import Rungs


class KvMapCommand(GroupedCommand):
    """FILE.svg comes last, and MODEL may be left out before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        model = ctx.params["model"]
        if ctx.params["picture"] is None and model is not None and model.lower().endswith(".svg"):
            ctx.params["picture"] = model
            (param,) = (each for each in self.params if each.name == "model")
            del ctx.params["model"]
            param.handle_parse_result(ctx, {}, [])  # as if it had not been typed
            if not isinstance(ctx.params.get("model"), str):
                ctx.params["model"] = None
        return rest


@click.command(name="kv-map", cls=KvMapCommand)
@prompt_options
@engine_options
@click.argument("picture", required=False, metavar="[FILE.svg]")
def kv_map(
    settings: Settings, text: str | None, files: tuple[str, ...], system: str | None, raw: bool, picture: str | None
) -> None:
    """Draw how the cache holds a prompt.

    The prompt is read as `kvlocal run` reads it, and what the budget has no room for is evicted. The picture shows for
    every layer and KV head how many tokens stand in which format, and how many are gone. Without FILE.svg it is drawn
    with letters, on standard output.

    \b
    kvlocal kv-map -f report.txt --budget 25%
    kvlocal kv-map model.gguf -f report.txt --policy ladder --budget 1024 heads.svg
    """
    from kvlocal_cli.render.heads import legend, rungs_map
    from kvlocal_cli.render.screen import Screen, out

    system = prompt.system_text(system, raw=raw)
    question = prompt.gather(text, files)
    path = None if picture is None else picture_path(picture)
    screen = Screen()
    with backend.open_engine(settings, screen) as engine:
        if engine.cache is None:
            raise UsageError(
                f"the policy {settings.policy} evicts nothing: every head holds every token in f16, and there is "
                "nothing to draw; name another one with --policy."
            )
        with Interrupt() as interrupt, NoEcho(discard=False):
            read_prompt(engine, prompt_tokens(engine, question, system, raw, screen), screen, interrupt)
        rungs = read_rungs(engine)
        assert rungs is not None
        if path is None:
            out(rungs_map(rungs))
        else:
            write_picture(path, rungs, engine)
            screen.show(legend(rungs))


def picture_path(text: str) -> Path:
    """Where the picture goes.

    Raises:
        UsageError: that is no place for an SVG file.
    """
    path = prompt.file_path(text)
    if path.suffix.lower() != ".svg":
        raise UsageError(f"'{text}' does not end in .svg; the picture is an SVG file.")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}' to write '{path.name}' to.")
    return path


def write_picture(path: Path, rungs: Rungs, engine: Engine) -> None:
    """Write the SVG file.

    Raises:
        KVError: it cannot be written.
    """
    from kvlocal_cli.render.heads_svg import rungs_svg

    title = f"{engine.model_name} · {engine.policy.name}, budget {engine.config.budget}"
    try:
        path.write_text(rungs_svg(rungs, title), "utf-8")
    except OSError as error:
        raise KVError(f"The picture cannot be written to {path}: {error.strerror or error}.") from error
