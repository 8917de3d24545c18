"""An engine with what is worth knowing of its context said on standard error; imported when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlocal.engine.config import EngineConfig
    from kvlocal.engine.engine import Engine
    from kvlocal.native.model import Model
    from kvlocal_cli.render.screen import Screen


def load_engine(config: EngineConfig, screen: Screen, *model: Model) -> Engine:
    """Make an engine, with `model` if that is loaded already, and show its notes."""
    from kvlocal.engine.engine import Engine

    engine = Engine(config, *model)
    for note in engine.notes:
        screen.line(note, "yellow")
    return engine
