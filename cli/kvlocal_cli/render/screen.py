"""Everything drawn with rich: progress, tables, the map of held tokens. Commands say what, this module says how."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
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
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np

    from kvlocal.eval.evaluation import Step as Case
    from kvlocal.measure.bench import Step

ReportDict = Mapping[str, Any]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_WIDTH = 80


class Screen:
    """Standard error as the user sees it; progress shows up only on a terminal, sentences always."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def line(self, text: str, style: str = "") -> None:
        """One line, however long."""
        self.console.print(Text(text, style), soft_wrap=True)

    def note(self, text: str | None) -> None:
        """A line that is good to know, if there is one."""
        if text is not None:
            self.line(text, "dim")

    def show(self, *renderables: RenderableType) -> None:
        for renderable in renderables:
            self.console.print(renderable)

    def status(self, text: str) -> AbstractContextManager[object]:
        """A spinner while something without a length goes on."""
        return self.console.status(Text(text, "dim"))

    @contextmanager
    def download(self) -> Iterator[Callable[[int, int | None, str], None]]:
        """A bar for a download, drawn from the first report on: `on_progress(done, total, name)` in bytes."""
        columns = (
            TextColumn("{task.description}"),
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
    def bench(self) -> Iterator[Callable[[Step], None]]:
        """What a benchmark is doing: `depth 4,096 · ada-snapkv 25% · prefill 2,048/4,096`."""
        if not self.console.is_terminal:
            yield lambda _step: None
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("")

            def on_step(step: Step) -> None:
                progress.update(task, description=step_text(step), completed=step.done, total=step.total)

            yield on_step

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[Case], None]]:
        """How far an evaluation is: `3/40 · niah_single_1/2`."""
        if not self.console.is_terminal:
            yield lambda _step: None
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("")

            def on_step(step: Case) -> None:
                progress.update(task, description=case_text(step), completed=step.done, total=step.total)

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
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("Prompt"), BarColumn(bar_width=32), _TokensColumn(self._start), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.add_task("prompt", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
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


def step_text(step: Step) -> str:
    return f"depth {step.depth:,} · {step.label} · {step.action} {step.done:,}/{step.total:,}"


def case_text(step: Case) -> str:
    return " · ".join(filter(None, [f"{step.done:,}/{step.total:,}", step.what]))


def out(*renderables: RenderableType) -> None:
    """Print on standard output, for commands whose result is a table."""
    console = Console(highlight=False)
    for renderable in renderables:
        console.print(renderable)


def size(n_bytes: float | None) -> str:
    """Bytes as `23.4 MiB`."""
    if n_bytes is None:
        return "n/a"
    value, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} GiB" if unit == "GiB" else f"{value:.1f} {unit}"


def rate(tokens_per_second: float | None) -> str:
    """`812 t/s`, with a decimal below 100."""
    if tokens_per_second is None:
        return "n/a"
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} t/s"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.4g}%"


def seconds(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f} s"


def figures(report: ReportDict) -> str:
    """The line after an answer. All measured, save for what a full cache *would* take: that one never existed."""
    kv, tokens, timing = report["kv"], report["tokens"], report["timing"]
    held = f"{number(tokens['held_mean'])} tokens held per head"
    if tokens["held_min"] != tokens["held_max"]:
        held += f" ({number(tokens['held_min'])} to {number(tokens['held_max'])})"
    parts = [
        f"KV {size(kv['used_bytes'])} in use / {size(kv['full_bytes'])} a full cache would take"
        f" / {size(kv['peak_bytes'])} peak",
        held,
        f"prefill {rate(timing['prefill_tps'])}, decode {rate(timing['decode_tps'])}",
    ]
    ending = {"length": "cut at the token limit", "interrupted": "interrupted"}.get(str(report["finish_reason"]))
    return " · ".join([*parts, ending] if ending else parts)


def budget_text(budget: Mapping[str, Any]) -> str:
    """A budget in all its units: `1,034 tokens per head = 25% = 23.3 MiB`."""
    return f"{number(budget['tokens'])} tokens per head = {percent(budget['fraction'])} = {size(budget['bytes'])}"


def stats_table(report: ReportDict) -> Table:
    """Every figure of a report."""
    kv, rss, tokens, timing = report["kv"], report["rss"], report["tokens"], report["timing"]
    args = ", ".join(f"{name}={value}" for name, value in report["policy_args"].items())
    sections = [
        [
            ("model", str(report["model"])),
            ("policy", f"{report['policy']} ({args})" if args else str(report["policy"])),
            ("budget", budget_text(report["budget"])),
        ],
        [
            ("tokens of the prompt", number(tokens["prompt"])),
            ("tokens generated", number(tokens["generated"])),
            ("tokens held per head, mean", number(tokens["held_mean"])),
            ("tokens held, least / most", f"{number(tokens['held_min'])} / {number(tokens['held_max'])}"),
        ],
        [
            ("KV in use", size(kv["used_bytes"])),
            ("KV allocated", size(kv["allocated_bytes"])),
            ("KV peak", size(kv["peak_bytes"])),
            ("a full f16 cache would take", size(kv["full_bytes"])),
        ],
        [
            ("RSS before / after eviction", _around_eviction(rss, size, " / ")),
            ("RSS peak", size(rss["peak_bytes"])),
        ],
        [
            ("load", seconds(timing["load_s"])),
            ("prefill", f"{seconds(timing['prefill_s'])}, {rate(timing['prefill_tps'])}"),
            ("time to first token", seconds(timing["ttft_s"])),
            ("eviction", seconds(timing["evict_s"])),
            ("decode", f"{seconds(timing['decode_s'])}, {rate(timing['decode_tps'])}"),
            ("finish reason", str(report["finish_reason"])),
        ],
    ]
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for rows in sections:
        for label, value in rows:
            table.add_row(label, Text(value), end_section=label == rows[-1][0])
    return table


def comparison_table(reports: Iterable[ReportDict]) -> Table:
    """One row per report; narrow enough for 80 columns."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
        show_edge=False,
        caption="MiB, all measured, save for `if full`: what a full f16 cache would take.",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for header in (
        "budget\ntokens",
        "held\nmean",
        "KV\nused",
        "KV\npeak",
        "if\nfull",
        "RSS, eviction\nbefore   after",
        "prefill\nt/s",
        "decode\nt/s",
    ):
        table.add_column(header, justify="right", overflow="fold")
    for report in reports:
        budget, kv, rss, timing = report["budget"], report["kv"], report["rss"], report["timing"]
        table.add_row(
            str(report["policy"]),
            f"{number(budget['tokens'])} ({_rounded(budget['fraction'])})",
            number(report["tokens"]["held_mean"]),
            *(_mib(kv[key]) for key in ("used_bytes", "peak_bytes", "full_bytes")),
            _around_eviction(rss, lambda n_bytes: f"{_mib(n_bytes):>6}", "  "),
            *(rate(timing[key]).removesuffix(" t/s") for key in ("prefill_tps", "decode_tps")),
        )
    return table


def _around_eviction(rss: Mapping[str, Any], show: Callable[[float | None], str], between: str) -> str:
    before, after = rss["before_evict_bytes"], rss["after_evict_bytes"]
    return "no eviction" if before is None else f"{show(before)}{between}{show(after)}"


def _mib(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "n/a"
    value = n_bytes / 2**20
    return f"{value:,.{0 if value >= 1000 else 1}f}"


def _rounded(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{fraction:.0%}"


def results_table(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> Table:
    """Titles, and whether they head names (to the left) or numbers (to the right)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, is_name in columns:
        table.add_column(title, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        # as text: brackets are no markup
        table.add_row(*map(Text, row))
    return table


def policies_table(rows: Iterable[Any]) -> Table:
    """Name, what it does and where it comes from, parameters with their defaults."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    table.add_column("policy", no_wrap=True, style="bold")
    table.add_column("what it does", ratio=4)
    table.add_column("parameters", ratio=3)
    for row in rows:
        about = Text(str(row.summary))
        if row.paper:
            about.append(f"\n{row.paper}", "dim")
        table.add_row(str(row.name), about, " ".join(f"{each.name}={_default(each)}" for each in row.parameters))
    return table


def parameters_table(rows: Iterable[Any]) -> Table:
    """What the parameters of all policies mean, each once."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", no_wrap=True, style="bold")
    table.add_column("meaning", ratio=4)
    table.add_column("values", ratio=3, style="dim")
    # A dict keeps the order; a name with two meanings gets two rows.
    for name, help, allowed in dict.fromkeys((p.name, p.help, p.allowed) for row in rows for p in row.parameters):
        table.add_row(name, help, Text(allowed))
    return table


def _default(parameter: Any) -> str:
    return "none" if parameter.default is None else str(parameter.default)


def held_map(held: Sequence[np.ndarray]) -> Text:
    """Tokens held per layer and KV head, at most 80 columns wide.

    Few heads: a bar and its count each. Many heads: one block per head, its height the count, and the layer's range.
    """
    layers = [[int(n) for n in layer] for layer in held]
    heads = [n for layer in layers for n in layer]
    most = max(heads, default=0)
    if most == 0:
        return Text("The cache is empty.")
    text = Text(
        f"Tokens held per layer (row) and KV head (column): "
        f"{min(heads):,} to {most:,}, mean {number(sum(heads) / len(heads))}"
    )
    label, digits, n_head = len(str(len(layers) - 1)), len(str(most)), max(map(len, layers))
    # A bar, a space, its count and two spaces have to fit as often as there are heads.
    bar = min((_WIDTH - label - 1) // n_head - digits - 3, 24)
    for index, layer in enumerate(layers):
        text.append(f"\n{index:>{label}} ", "dim")
        if bar >= 4:
            for n in layer:
                text.append(_bar(n, most, bar), "cyan")
                text.append(f" {n:>{digits}}  ")
        else:
            room = _WIDTH - label - 1 - (2 * digits + 3)
            text.append("".join(_LEVELS[-(-8 * n // most)] for n in _pool(layer, room)), "cyan")
            text.append(f"  {min(layer):>{digits}}-{max(layer):<{digits}}", "dim")
        text.rstrip()
    return text


def _bar(n: int, most: int, width: int) -> str:
    eighths = -(-8 * width * n // most)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _pool(layer: list[int], room: int) -> list[int]:
    """Means over neighbouring heads, so that at most `room` are left."""
    step = -(-len(layer) // room)
    groups = [layer[i : i + step] for i in range(0, len(layer), step)]
    return [round(sum(group) / len(group)) for group in groups]
