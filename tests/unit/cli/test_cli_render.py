"""Numbers as text, progress on a terminal, and the way from flags to the engine."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvlocal_cli.backend import engine as backend
from kvlocal_cli.options.settings import SamplingSettings, Settings
from kvlocal_cli.render.numbers import percent, rate, size
from kvlocal_cli.render.report import figures
from kvlocal_cli.render.screen import PlainConsole, Screen
from rich.console import Console

from kvlocal.errors import UsageError


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (None, "n/a"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (24 * 2**20, "24.0 MiB"),
        (1536 * 2**20, "1.50 GiB"),
        (2**42, "4096.00 GiB"),
    ],
)
def test_sizes(n_bytes: int | None, text: str) -> None:
    assert size(n_bytes) == text


def test_rates_and_shares() -> None:
    assert [rate(x) for x in (None, 0.0, 7.94, 99.96, 1234.5)] == [
        "n/a",
        "0.0 t/s",
        "7.9 t/s",
        "100.0 t/s",
        "1,234 t/s",
    ]
    assert [percent(x) for x in (None, 0.25, 1.0, 0.12345)] == ["n/a", "25%", "100%", "12.35%"]


def test_figures_without_eviction_or_measurement() -> None:
    line = figures(
        {
            "kv": {"used_bytes": 0, "full_bytes": 0, "peak_bytes": None, "fixed_bytes": 0},
            "tokens": {"held_mean": 12.0, "held_min": 12, "held_max": 12},
            "reads": None,
            "archive": None,
            "timing": {"prefill_tps": 100.0, "decode_tps": None},
            "finish_reason": "stop",
        }
    )
    assert line == (
        "KV 0 B in use / 0 B a full cache would take / n/a peak · 12 tokens held per head · prefill 100 t/s, decode n/a"
    )


def test_figures_of_a_part_that_was_read() -> None:
    line = figures(
        {
            "kv": {"used_bytes": 0, "full_bytes": 0, "peak_bytes": 0, "fixed_bytes": 0},
            "tokens": {"held_mean": 4096.0, "held_min": 4096, "held_max": 4096},
            "reads": {"tokens": 1023.4},
            "archive": None,
            "timing": {"prefill_tps": 100.0, "decode_tps": 50.0},
            "finish_reason": "stop",
        }
    )
    assert " · 4,096 tokens held per head · 1,023 read at a time · prefill " in line


def terminal() -> tuple[Screen, io.StringIO]:
    screen, text = Screen(), io.StringIO()
    screen.console = PlainConsole(file=text, force_terminal=True, width=100, highlight=False, color_system=None)
    return screen, text


def test_progress_is_drawn_on_a_terminal_only() -> None:
    screen, text = terminal()
    with screen.prefill() as bar:
        bar.update(256, 1024)
        bar.update(1024, 1024)
        bar.stop()
        assert "1,024/1,024 tokens · " in text.getvalue() and " t/s" in text.getvalue()
    with screen.download() as on_progress:
        on_progress(10, None, "model.gguf")
        on_progress(2000, 2000, "model.gguf")
    assert "model.gguf" in text.getvalue() and "2.0/2.0 kB" in text.getvalue()
    with screen.status("Loading model.gguf"):
        pass
    assert "Loading model.gguf" in text.getvalue()

    silent = Screen()
    silent.console = Console(file=(quiet := io.StringIO()), force_terminal=False)
    with silent.prefill() as bar, silent.status("Loading"), silent.download() as on_progress:
        bar.update(1, 2)
        on_progress(1, 2, "model.gguf")
    assert quiet.getvalue() == ""


def test_the_sentences_of_a_model_are_no_markup_and_no_control_sequences() -> None:
    screen, text = terminal()
    screen.line("[red]a[/red] \x1b]52;c;aGk=\x07\x9b31m" + "long " * 40 + "end")
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("[red]a[/red] ]52;c;aGk=31mlong ")
    assert all(len(line) <= 100 and not line.startswith("ng") for line in lines), "broken between words"
    assert "\x1b" not in text.getvalue() and "\x07" not in text.getvalue() and "\x9b" not in text.getvalue()
    pipe = Screen()
    pipe.console = PlainConsole(file=(quiet := io.StringIO()), width=80)
    pipe.line("long " * 40 + "end")
    assert quiet.getvalue() == "long " * 40 + "end\n"


# --- flags reach the real classes ------------------------------------------------------------------------------------


def test_settings_become_an_engine_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvlocal.engine import engine
    from kvlocal.models import resolve as models

    seen: dict[str, Any] = {}

    def resolve(spec: str | None, *, progress: Any = None) -> Path:
        progress(1, 2, "model")
        seen["model"] = spec
        return tmp_path / "model.gguf"

    monkeypatch.setattr(models, "resolve_model", resolve)
    monkeypatch.setattr(engine, "Engine", lambda config: SimpleNamespace(config=config, notes=["It is large."]))
    settings = Settings("m.gguf", "ada-snapkv", {"window": "16"}, "25%", 4096, 64, 32, 2, 1, "portable", "chunked", 128)
    lines: list[str] = []
    monkeypatch.setattr(Screen, "line", lambda _screen, text, style="": lines.append(text))
    config: Any = backend.open_engine(settings, Screen()).config
    assert lines == ["It is large."]
    assert seen["model"] == "m.gguf" and config.model == tmp_path / "model.gguf"
    assert (config.policy.name, config.policy.window, str(config.budget)) == ("ada-snapkv", 16, "25%")
    assert (config.n_ctx, config.n_batch, config.n_ubatch, config.n_threads) == (4096, 64, 32, 2)
    assert (config.n_gpu_layers, config.kernels, config.prefill, config.chunk) == (1, "portable", "chunked", 128)

    seen.clear()
    for wrong in (Settings(policy="nonsense"), Settings(budget="many"), Settings(policy_args={"nonsense": "1"})):
        with pytest.raises(UsageError):
            backend.open_engine(wrong, Screen())
    assert not seen, "a typing error must not start a download"


def test_the_sampling_defaults_are_the_engines() -> None:
    from kvlocal.native.sampling import Sampling

    assert backend.new_sampling(SamplingSettings()) == Sampling()
