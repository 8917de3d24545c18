"""The layout: what a folder may import, no circles, no file too long to read, a first line that says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = {"kvlocal": REPO / "kvlocal", "kvlocal_cli": REPO / "cli" / "kvlocal_cli"}
MAX_LINES = 400

ARROWS: dict[str, set[str]] = {
    "kvlocal": {"kvlocal.api", "kvlocal.errors"},
    "kvlocal.errors": set(),
    "kvlocal.files": {"kvlocal.errors"},
    "kvlocal.jsonl": {"kvlocal.errors"},
    "kvlocal.setting": {"kvlocal.errors"},
    "kvlocal.settings": {"kvlocal.setting"},
    "kvlocal.params": {"kvlocal.errors", "kvlocal.setting"},
    "kvlocal.native": set(),
    "kvlocal.policies": {"kvlocal.native.formats"},
    "kvlocal.retrieval": {"kvlocal.native.retrieval"},
    "kvlocal.models": {"kvlocal.native"},
    "kvlocal.storage": {"kvlocal.native", "kvlocal.policies"},
    "kvlocal.engine": {"kvlocal.native", "kvlocal.policies", "kvlocal.retrieval", "kvlocal.models", "kvlocal.storage"},
    "kvlocal.batch": {"kvlocal.engine"},
    "kvlocal.measure": {"kvlocal.engine"},
    "kvlocal.eval": {"kvlocal.engine", "kvlocal.measure"},
    "kvlocal.doctor": {"kvlocal.engine", "kvlocal.measure"},
    "kvlocal.api": {"kvlocal.engine"},
    "kvlocal.__main__": {"kvlocal_cli.start"},
    "kvlocal_cli": set(),
    "kvlocal_cli.start": {"kvlocal_cli.main"},
    "kvlocal_cli.main": {"kvlocal_cli.commands"},
    "kvlocal_cli.commands": {"kvlocal_cli.backend"},
    "kvlocal_cli.backend": {"kvlocal_cli.terminal"},
    "kvlocal_cli.terminal": {"kvlocal_cli.render"},
    "kvlocal_cli.render": {"kvlocal_cli.options"},
    "kvlocal_cli.options": {"kvlocal.batch", "kvlocal.measure", "kvlocal.eval", "kvlocal.doctor", "kvlocal.api"},
}
"""What the files of a room may import beside their own room; the rooms below those count too."""

BELOW_ALL = {"kvlocal", "kvlocal.errors", "kvlocal.files", "kvlocal.jsonl", "kvlocal.params"}
BELOW_ALL |= {"kvlocal.setting", "kvlocal.settings"}
"""What every room but these themselves may import: the version, errors, files, settings."""

KNOWN: set[str] = set()
"""Faults that are still there. The list only gets shorter: an entry that is no fault any more fails the test."""


def module_name(path: Path) -> str:
    for package, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join([package, *parts]).removesuffix(".__init__")
    raise AssertionError(path)


FILES = {module_name(path): path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))}


def imports(module: str, source: str, known: set[str]) -> Iterator[str]:
    """Modules of the project that a file imports anywhere in it, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            if node.module is not None and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in known else node.module


def room(module: str) -> str:
    """The longest name in the plan that the module lies in; the packages' own files are rooms by themselves."""
    found = [name for name in ARROWS if module == name or (module.startswith(name + ".") and name not in PACKAGES)]
    return max(found, key=len, default=module)


def allowed(name: str) -> set[str]:
    """A room and all below it."""
    reached: set[str] = set()
    ahead = [name]
    while ahead:
        if (step := ahead.pop()) not in reached:
            reached.add(step)
            ahead += ARROWS.get(step, set())
    return reached if name in BELOW_ALL else reached | BELOW_ALL


def may_import(module: str, target: str) -> bool:
    return any(
        target == name or (name not in PACKAGES and target.startswith(name + ".")) for name in allowed(room(module))
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches every other one."""
    reach: dict[str, set[str]] = {}
    for module in graph:
        reached: set[str] = set()
        ahead = list(graph[module])
        while ahead:
            if (step := ahead.pop()) not in reached:
                reached.add(step)
                ahead += graph.get(step, set())
        reach[module] = reached
    groups = {
        tuple(sorted(other for other in reach[module] | {module} if module in reach.get(other, set())))
        for module in graph
        if module in reach[module]
    }
    return [list(group) for group in sorted(groups)]


def sources() -> list[Path]:
    """Every source file of ours in Python, C, C++ and CUDA."""
    folders = ["kvlocal", "cli", "tests", "benchmarks", "tools", "patches/overlay"]
    kinds = (".py", ".h", ".cpp", ".cu")
    found = [path for folder in folders for path in (REPO / folder).rglob("*") if path.suffix in kinds]
    return sorted([*found, *(REPO / "vendor").glob("*.py")])


def upward() -> Iterator[str]:
    for module, path in FILES.items():
        for target in sorted(set(imports(module, path.read_text("utf-8"), set(FILES)))):
            if not may_import(module, target):
                yield f"{module} -> {target}"


def in_circles() -> Iterator[str]:
    # kvlocal/__init__.py imports what it exports when that is asked for, and every import passes through it
    graph = {
        module: set(imports(module, path.read_text("utf-8"), set(FILES))) - {module, "kvlocal"}
        for module, path in FILES.items()
    }
    yield from ("circle: " + ", ".join(group) for group in circles(graph))


def too_long() -> Iterator[str]:
    for path in sources():
        n = len(path.read_text("utf-8").splitlines())
        if n > MAX_LINES:
            yield f"long: {path.relative_to(REPO)}"


def nameless() -> Iterator[str]:
    """Files whose first line does not say what they are for."""
    for path in sources():
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            says = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
        else:
            says = text.split("\n")[0].removeprefix("//").strip() if text.startswith("//") else ""
        if not says:
            yield f"says nothing: {path.relative_to(REPO)}"


FAULTS = {"upward": upward, "circles": in_circles, "length": too_long, "first line": nameless}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_layout_holds(kind: str) -> None:
    assert [fault for fault in FAULTS[kind]() if fault not in KNOWN] == []


def test_what_is_known_is_still_so() -> None:
    found = {fault for find in FAULTS.values() for fault in find()}
    assert found >= KNOWN, "mended: take it off the list"


def test_every_file_is_in_a_room() -> None:
    assert {module for module in FILES if room(module) not in ARROWS} == set()
    assert {name for name in ARROWS if not any(room(module) == name for module in FILES)} == set()


def test_policies_are_numpy_only() -> None:
    """Neither they nor what they import sees ctypes or the binding."""
    ahead, seen = [m for m in FILES if m.startswith("kvlocal.policies")], set()
    while ahead:
        if (module := ahead.pop()) in seen:
            continue
        seen.add(module)
        source = FILES[module].read_text("utf-8")
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(source))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not names & {"ctypes", "llama_cpp"}, module
        # the package itself imports what it exports when it is asked for
        ahead += [target for target in imports(module, source, set(FILES)) if target not in PACKAGES]


def test_the_checks_see_what_they_are_for() -> None:
    known = {"kvlocal.api", "kvlocal.engine.engine", "kvlocal.native.cache", "kvlocal.policies.snapkv"}
    hidden = "def f():\n    from kvlocal.engine import engine\n    import kvlocal.api\n    from os import path\n"
    assert list(imports("x", hidden, known)) == ["kvlocal.engine.engine", "kvlocal.api"]
    assert not may_import("kvlocal.native.cache", "kvlocal.policies.snapkv")
    assert not may_import("kvlocal.policies.snapkv", "kvlocal.native.cache")
    assert not may_import("kvlocal.engine.engine", "kvlocal.api")
    assert not may_import("kvlocal.errors", "kvlocal.files")
    assert not may_import("kvlocal_cli.options.settings", "kvlocal_cli.commands.run")
    assert may_import("kvlocal.policies.ladder", "kvlocal.native.formats")
    assert may_import("kvlocal_cli.commands.run", "kvlocal.native.cache")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
