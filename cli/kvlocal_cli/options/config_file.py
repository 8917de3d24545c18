"""The configuration file: read, checked against the options there are, turned into click's `default_map`."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from kvlocal.errors import UsageError
from kvlocal_cli.options import twins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULTS = "defaults"
"""The table whose keys all commands take."""

META = "kvlocal.engine.config"
"""Where a context keeps the :class:`ConfigFile` of this run."""


@dataclass(frozen=True)
class Entry:
    """One key of a table; `table`: as it is written, such as `eval.kld`; `value`: as click takes it."""

    table: str
    key: str
    value: Any


@dataclass(frozen=True)
class ConfigFile:
    """What a file says.

    Attributes:
        path: the file, or None for none.
        entries: by command, then by the name of its parameter; what is nearer to the command has won.
    """

    path: Path | None = None
    entries: Mapping[twins.Path, Mapping[str, Entry]] = field(default_factory=dict)

    def default_map(self) -> dict[str, Any]:
        """Values by parameter, a level for every command."""
        out: dict[str, Any] = {}
        for path, entries in self.entries.items():
            level = out
            for name in path:
                level = level.setdefault(name, {})
            level.update({name: entry.value for name, entry in entries.items()})
        return out

    def hint(self, path: twins.Path, name: str) -> str:
        """Where the value of a parameter comes from, for an error."""
        entry = self.entries[path][name]
        return f"'{entry.key}' in [{entry.table}] of {self.path}"


def default_path() -> Path:
    """Where the file is when nothing names another."""
    from platformdirs import user_config_path

    return user_config_path("kvlocal") / "config.toml"


def read(path: Path | None, root: click.Group) -> ConfigFile:
    """What `path`, or the default file if there is one, says about the commands of `root`.

    Raises:
        UsageError: it cannot be read, is not TOML, or holds a table, a key or a type of value that there is not.
    """
    if path is None:
        path = default_path()
        if not path.exists():
            return ConfigFile()
    return ConfigFile(path, _Reader(path, root).entries(_load(path)))


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8").removeprefix("\ufeff"))
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file '{path}'; `kvlocal config init` writes one.") from None
    except OSError as error:
        raise UsageError(f"the configuration file '{path}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 at offset {error.start}; a configuration file is TOML in UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}; a line is `key = value`, a text stands in quotes.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, tables in tables without end
        raise UsageError(f"{path} holds a value that cannot be read: {error}.") from None


@dataclass(frozen=True)
class _Reader:
    path: Path
    root: click.Group

    def entries(self, data: Mapping[str, Any]) -> dict[twins.Path, dict[str, Entry]]:
        commands = {path: command for path, command in twins.walk(self.root) if path}
        out: dict[twins.Path, dict[str, Entry]] = {}
        # general tables first, so that special ones overwrite them
        for prefix, table, key, value in sorted(self.tables(data), key=lambda each: len(each[0])):
            for path, command in commands.items():
                param = keys(command).get(key) if path[: len(prefix)] == prefix else None
                if param is not None:
                    entry = Entry(table, key, self.value(table, key, path, param, value))
                    out.setdefault(path, {})[param.name or key] = entry
        return out

    def tables(self, data: Mapping[str, Any]) -> Iterator[tuple[twins.Path, str, str, Any]]:
        """Command, table, key and value of all that is there."""
        below = {name: some for name, command in self.root.commands.items() if (some := _keys_below(command))}
        known = [DEFAULTS, *below]
        for name, table in data.items():
            if not isinstance(table, dict):
                raise UsageError(f"{self.path}: '{name}' stands in no table; put it into {_listed(_tables(known))}.")
            if name == DEFAULTS:
                yield from self.table((), DEFAULTS, set().union(*below.values()), {}, table)
            elif name in below:
                command = self.root.commands[name]
                nested = command.commands if isinstance(command, click.Group) else {}
                yield from self.table((name,), name, below[name], nested, table)
            else:
                close = _closest(name, known, "[{}]")
                raise UsageError(f"{self.path}: there is no table [{name}]{close}; give {_listed(_tables(known))}.")

    def table(
        self,
        path: twins.Path,
        title: str,
        known: set[str],
        nested: Mapping[str, click.Command],
        table: Mapping[str, Any],
    ) -> Iterator[tuple[twins.Path, str, str, Any]]:
        for key, value in table.items():
            if key in nested and isinstance(value, dict):
                yield from self.table((*path, key), f"{title}.{key}", _keys_below(nested[key]), {}, value)
            elif key in known:
                yield path, title, key, value
            else:
                close = _closest(key, known, "'{}'")
                allowed = [*sorted(known), *_tables(f"{title}.{name}" for name in nested)]
                raise UsageError(f"{self.path}: [{title}] has no key '{key}'{close}; give {_listed(allowed)}.")

    def value(self, table: str, key: str, path: twins.Path, param: click.Parameter, value: Any) -> Any:
        """`value` as click takes it."""
        kinds, allowed, convert = _kind(param)
        many = value if isinstance(value, list) else [value]
        single = isinstance(param, click.Option) and param.multiple
        if (single and not isinstance(value, list)) or (many is value and convert is None) or not _all(many, kinds):
            given = json.dumps(value, ensure_ascii=False, default=str)
            command = f" to `kvlocal {' '.join(path)}`" if table != ".".join(path) else ""
            raise UsageError(f"{self.path}: '{key}' in [{table}] is {given}; give {allowed}{command}.")
        return value if convert is None else convert(many)


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """What a command's table can hold."""
    named = ((twins.key(param), param) for param in command.params)
    return {name: param for name, param in named if name is not None}


def _keys_below(command: click.Command) -> set[str]:
    """What can be given to a command or to one below it."""
    return {name for _, each in twins.walk(command) for name in keys(each)}


def _kind(param: click.Parameter) -> tuple[tuple[type, ...], str, Callable[[list[Any]], Any] | None]:
    """The types that a value, or each of a list, may have, how to say that, and for what may be a list, what becomes
    of it. Ranges and choices are click's to check."""
    kind, numbers = param.type, getattr(param.type, "numbers", False)
    if isinstance(param, click.Option) and param.multiple:
        return (str,), 'a list of texts, as ["…"]', list
    if kind.name == "list":
        texts = (str, int, float) if numbers else (str,)
        return (
            texts,
            f"a text{' or a number' if numbers else ''}, or a list of them",
            lambda many: ",".join(map(str, many)),
        )
    for known, types, allowed in (
        (click.types.BoolParamType, (bool,), "true or false"),
        (click.IntRange, (int,), "a whole number"),
        (click.types.IntParamType, (int,), "a whole number"),
        (click.FloatRange, (int, float), "a number"),
        (click.types.FloatParamType, (int, float), "a number"),
    ):
        if isinstance(kind, known):
            return types, allowed, None
    if isinstance(kind, click.Choice):
        return (str,), _listed(f'"{choice}"' for choice in kind.choices), None
    return ((str, int), "a text or a whole number", None) if numbers else ((str,), "a text", None)


def _all(values: Iterable[Any], types: tuple[type, ...]) -> bool:
    # a bool is an int to Python, not to TOML
    return all(isinstance(each, types) and (bool in types or not isinstance(each, bool)) for each in values)


def _tables(names: Iterable[str]) -> list[str]:
    return [f"[{name}]" for name in names]


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _closest(word: str, known: Iterable[str], form: str) -> str:
    matches = difflib.get_close_matches(word.lower().replace("_", "-"), list(known), n=1, cutoff=0.6)
    return f" (did you mean {form.format(matches[0])}?)" if matches else ""
