"""How far a batch is, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvlocal_cli.render.numbers import rate, size

if TYPE_CHECKING:
    from kvlocal.batch.batch import Step


class BatchBar:
    """A bar on a terminal; elsewhere only the figures of the last step are kept."""

    def __init__(self, console: Console, total: int) -> None:
        self.last: Step | None = None
        self.start = time.perf_counter()
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("", total=total)
            self._progress.start()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def update(self, step: Step) -> None:
        self.last = step
        if self._progress is not None:
            self._progress.update(self._task, completed=step.done, description=step_text(step, self.seconds))

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def batch_bar(console: Console, total: int) -> Iterator[BatchBar]:
    bar = BatchBar(console, total)
    try:
        yield bar
    finally:
        bar.stop()


def _figures(step: Step, seconds: float) -> str:
    hours = seconds / 3600
    failed = f" ({step.failed} failed)" if step.failed else ""
    per_hour = f"{step.done / hours:,.0f} documents/h" if seconds else ""
    return f"{failed} · {per_hour} · {rate((step.prompt + step.generated) / seconds if seconds else None)}"


def step_text(step: Step, seconds: float) -> str:
    """`12 done (1 failed) · 143 documents/h · 512 t/s · KV 24.1 MiB`."""
    return f"{step.done} done{_figures(step, seconds)} · KV {size(step.used_bytes)}"


def summary(step: Step | None, seconds: float, output: str) -> str:
    """What the whole run came to, for its last line."""
    if step is None:
        return "Nothing was done."
    documents = f"{step.done} document{'' if step.done == 1 else 's'}"
    tokens = f"{step.prompt:,} tokens read, {step.generated:,} written"
    return f"{documents}{_figures(step, seconds)} · {tokens} · KV peak {size(step.peak_bytes)} · {output}"
