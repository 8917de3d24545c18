"""Standard error and standard output as rich draws on them: sentences, progress, tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.text import Text

from kvlocal.errors import KVError
from kvlocal_cli.render.controls import plain
from kvlocal_cli.render.numbers import rate


class Step(Protocol):
    """How far something is."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


AnyStep = TypeVar("AnyStep", bound=Step)


class PlainConsole(Console):
    """A console on which texts cannot act: control characters in what is drawn are dropped, rich's own are not."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


class Screen:
    """Standard error as the user sees it; progress shows up only on a terminal, sentences always."""

    def __init__(self) -> None:
        self.console: Console = PlainConsole(stderr=True, highlight=False)

    def line(self, text: str, style: str = "") -> None:
        """A sentence: broken between words on a terminal, one line elsewhere."""
        self.console.print(Text(text, style), soft_wrap=not self.console.is_terminal)

    def unsaved(self, error: KVError) -> None:
        """A prompt cache that cannot be written is no reason to stop."""
        self.line(f"Warning: the prompt cache was not kept. {error}", "yellow")

    def note(self, text: str | None) -> None:
        """A line that is good to know, if there is one."""
        if text is not None:
            self.line(text, "dim")

    def show(self, *renderables: RenderableType) -> None:
        """Tables and texts, one below the other."""
        for renderable in renderables:
            self.console.print(renderable)

    def status(self, text: str) -> AbstractContextManager[object]:
        """A spinner while something without a length goes on."""
        return self.console.status(Text(text, "dim"))

    @contextmanager
    def download(self) -> Iterator[Callable[[int, int | None, str], None]]:
        """A bar for a download, drawn from the first report on: `on_progress(done, total, name)` in bytes."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        if not self.console.is_terminal:
            yield lambda _done, _total, _name: None
            return
        with Progress(*columns, console=self.console, transient=True) as progress:
            tasks: dict[str, Any] = {}

            def on_progress(done: int, total: int | None, name: str) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
                progress.update(tasks[name], completed=done, total=total)

            yield on_progress

    def prefill(self) -> PrefillBar:
        """A bar while a prompt is processed."""
        return PrefillBar(self.console)

    @contextmanager
    def progress(self, describe: Callable[[AnyStep], str]) -> Iterator[Callable[[AnyStep], None]]:
        """A bar over steps of any kind: `on_step(step)`, with what `describe` says of it beside the bar."""
        if not self.console.is_terminal:
            yield lambda _step: None
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("")

            def on_step(step: AnyStep) -> None:
                progress.update(task, description=describe(step), completed=step.done, total=step.total)

            yield on_step


class PrefillBar:
    """Tokens done, tokens per second. Gone before the answer starts: call :meth:`stop` at its first piece."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> PrefillBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def update(self, done: int, total: int) -> None:
        """Draw how many tokens of the prompt are done."""
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("Prompt"), BarColumn(bar_width=32), _TokensColumn(self._start), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.add_task("prompt", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _TokensColumn(ProgressColumn):
    """`1,024/3,012 tokens · 812 t/s`, the rate over the whole prompt so far."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self._start = start

    def render(self, task: Task) -> Text:
        seconds = max(time.perf_counter() - self._start, 1e-6)
        done, total = int(task.completed), int(task.total or 0)
        return Text(f"{done:,}/{total:,} tokens · {rate(done / seconds)}", "dim")


def out(*renderables: RenderableType) -> None:
    """Print on standard output, for commands whose result is a table."""
    console = PlainConsole(highlight=False)
    for renderable in renderables:
        console.print(renderable)


def out_width() -> int:
    """Columns of standard output."""
    return PlainConsole().width
