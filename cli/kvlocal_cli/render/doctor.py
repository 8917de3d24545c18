"""The report of `kvlocal doctor` as text that can be pasted: nothing is wrapped, the home folder is ~."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.text import Text

from kvlocal_cli.render.numbers import placement, size
from kvlocal_cli.render.screen import PlainConsole, Screen

Report = Mapping[str, Any]
Rows = Iterator[tuple[str, str]]

_LABEL = 20


@contextmanager
def steps(screen: Screen) -> Iterator[Callable[[str], None]]:
    """A spinner while several things go on: `on_step(what)`."""
    with screen.console.status(Text("", "dim")) as status:
        yield lambda what: status.update(Text(what[:1].upper() + what[1:], "dim"))


def show_report(report: Report) -> None:
    """Print it on standard output."""
    console = PlainConsole(highlight=False)
    for line in report_lines(report):
        console.print(line, soft_wrap=True)


def report_lines(report: Report) -> Iterator[Text]:
    """All lines of it."""
    sections = (
        ("Versions", iter(report["versions"].items())),
        ("Library", _library(report["library"])),
        ("Processor", _cpu(report["cpu"])),
        ("Devices", _devices(report["devices"])),
        ("Memory", _memory(report["memory"])),
        ("Paths", _places(report["places"])),
        ("Model", _model(report["model"])),
    )
    for title, rows in sections:
        yield Text(title, "bold")
        for label, value in rows:
            yield Text(f"  {label:<{_LABEL}}{_short(value)}".rstrip())
        yield Text()
    yield from _tests(report["tests"])
    for kind, style, sentences in (
        ("FAIL", "bold red", report["failures"]),
        ("warning", "yellow", report["warnings"]),
    ):
        for sentence in sentences:
            yield Text.assemble((f"{kind}: ", style), _short(sentence))
    yield Text(_verdict(report), "bold green" if report["ok"] else "bold red")


def _short(text: str) -> str:
    """Names of users are nobody's business."""
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if home != os.sep else text


def _verdict(report: Report) -> str:
    failed = sum(not test["passed"] for test in report["tests"]) + len(report["failures"])
    warned = len(report["warnings"])
    some = f"{failed} failure{'' if failed == 1 else 's'}" if failed else "Nothing failed"
    return f"{some}, {warned} warning{'' if warned == 1 else 's'}." if warned else f"{some}."


def _library(library: Report) -> Rows:
    if library["path"] is None:
        yield "path", f"nothing could be loaded from {library['folder']}"
        return
    yield "path", library["path"]
    yield "binding", f"llama-cpp-python {library['binding']}, {library['binding_path']}"
    yield "llama.cpp", f"{library['llama_cpp_commit']}, KVL ABI {library['abi']}"
    yield "ours", "yes" if library["ours"] else "no"
    yield "page kernels", library["kernels"]
    if library["spinning"] is not None:
        yield "waiting threads", _waiting(library["spinning"])
    for backend, features in library["system_info"].items():
        yield f"{backend} built with", " ".join(n if v == "1" else f"{n}={v}" for n, v in features.items())


def _waiting(how: Report) -> str:
    runtime = f", {how['runtime']}" if how["runtime"] else ""
    return {
        "kvlocal": f"spin a little, then sleep ({how['setting']}{runtime})",
        "environment": f"as your environment says ({how['setting']}{runtime})",
        "earlier": f"as the OpenMP library says that was loaded before ({how['runtime']})",
        "other": f"as their OpenMP library says ({how['runtime'] or 'unknown'})",
        "own": f"sleep between graphs, spin within one (no OpenMP, {how['setting']})",
    }[how["source"]]


def _cpu(cpu: Report) -> Rows:
    yield "name", f"{cpu['name']} ({cpu['architecture']})"
    yield "threads", f"{cpu['threads']}: {cpu['threads_reason']}"
    yield "has", " ".join(cpu["features"]) or "unknown"
    for label, key in (("lacks of the build", "lacking"), ("unused by the build", "unused")):
        if cpu[key]:
            yield label, " ".join(cpu[key])


def _devices(devices: list[Report]) -> Rows:
    for device in devices:
        memory = f"{size(device['free_bytes'])} of {size(device['total_bytes'])} free"
        yield device["name"], f"{device['description']} ({device['kind']}, backend {device['backend']}), {memory}"
        yield "page kernels", _tested(device)
    if not devices:
        yield "none", ""


def _tested(device: Report) -> str:
    if device["kernels"] == "portable path":
        return "none: portable path"
    on = device["tested"]
    return device["kernels"] if on is None else f"{device['kernels']} ({on['card']}, {on['date']})"


def _memory(memory: Report) -> Rows:
    yield "RAM", f"{size(memory['available_bytes'])} of {size(memory['total_bytes'])} free"
    swap = f"{size(memory['swap_free_bytes'])} of {size(memory['swap_total_bytes'])} free"
    yield "swap", swap if memory["swap_total_bytes"] else "none"


def _places(places: list[Report]) -> Rows:
    for place in places:
        yield place["name"], place["path"] if place["exists"] else f"{place['path']} (not there)"


def _model(model: Report | None) -> Rows:
    if model is None:
        yield "none", "(`kvlocal pull` fetches the default one)"
        return
    yield "path", model["path"]
    yield "name", model["name"]
    about = f"{model['description']}, {size(model['size_bytes'])}, trained for {model['n_ctx_train']:,} tokens"
    yield "architecture", f"{model['architecture']} ({about})"
    yield "can be paged", "yes" if model["refused"] is None else f"no: {model['refused']}"
    for i, place in enumerate(model["pages"]):
        yield "" if i else "pages", placement(place)
    formats = model["formats"]
    if formats:
        yield "can be stored in", " ".join(name for name, reason in formats.items() if reason is None)
    for name, reason in formats.items():
        if reason is not None:
            yield f"not in {name}", reason


def _tests(tests: list[Report]) -> Iterator[Text]:
    if not tests:
        yield Text("Self-test: not run", "bold")
        yield Text()
        return
    yield Text("Self-test: largest error, and what is allowed", "bold")
    width = max(len(test["name"]) for test in tests)
    for test in tests:
        mark = ("PASS", "green") if test["passed"] else ("FAIL", "bold red")
        error = "not a number" if test["error"] is None else f"{test['error']:.1e}" if test["error"] else "0"
        allowed = f"{test['tolerance']:.0e}" if test["tolerance"] else "0"
        of = f" of the {test['unit']}" if test["unit"] else ""
        what = _short(test["detail"]) or f"{error:>8}  {allowed:>5}{of}"
        yield Text.assemble("  ", mark, f"  {test['name']:<{width}}  {what}")
    yield Text()
