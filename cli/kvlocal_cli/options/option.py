"""Options and the commands that have them: sections of a help page, whom to blame for a value, nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from kvlocal import setting as kinds
from kvlocal.errors import UsageError
from kvlocal_cli.options import config_file, twins
from kvlocal_cli.options.click_types import Names, Real, Size, Sizes, Whole, Wholes

Callback = Callable[..., Any]
Decorator = Callable[[Callback], Callback]


class GroupedOption(click.Option):
    """An option that names the section of the help page it is listed in.

    Attributes:
        setting: the declaration that it was made from, if it was.
        typed_only: it has to be typed: it has neither a variable nor a key in the configuration file.
    """

    def __init__(
        self,
        *args: Any,
        section: str = "Options",
        setting: kinds.Setting | None = None,
        typed_only: bool = False,
        **attrs: Any,
    ) -> None:
        super().__init__(*args, **attrs)
        self.section = section
        self.setting = setting
        self.typed_only = typed_only

    def consume_value(self, ctx: click.Context, opts: Any) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if self.name is not None:
            # some versions of click do so only once the value has been taken, which is too late to blame its source
            ctx.set_parameter_source(self.name, source)
        return value, source


class _Once(click.Command):
    """Refuses an option that is typed twice and of which only the last would count."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for param, n in Counter(order).items():
                # of a flag that cannot be taken back, the second changes nothing
                if n > 1 and isinstance(param, click.Option) and _keeps_last(param):
                    ways = " / ".join([*param.opts, *param.secondary_opts])
                    raise UsageError(f"{ways} is given {n} times, and takes one value; give it once.")
        return super().parse_args(ctx, args)


def _keeps_last(option: click.Option) -> bool:
    return not (option.multiple or option.count or (option.is_flag and not option.secondary_opts))


class GroupedCommand(_Once):
    """A command whose help page lists its options by section.

    A value that cannot be taken is blamed on the variable or on the file that it comes from.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            name = error.param.name if error.param is not None else None
            source = ctx.get_parameter_source(name) if name is not None else None
            if error.param is not None and source is ParameterSource.ENVIRONMENT:
                error.param_hint = str(error.param.envvar)
            elif name is not None and source is ParameterSource.DEFAULT_MAP:
                file: config_file.ConfigFile = ctx.meta[config_file.META]
                error.param_hint = file.hint(twins.path_of(ctx), name)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            # Arguments are explained in the text above the options.
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class GroupedGroup(_Once, click.Group):
    """A group of such commands."""

    command_class = GroupedCommand


def option(section: str, *names: str, **attrs: Any) -> Decorator:
    """`click.option` with a section; defaults are shown."""
    return click.option(*names, cls=GroupedOption, section=section, **{"show_default": True, **attrs})


def count(section: str, *names: str, default: int, minimum: int, help: str) -> Decorator:
    """An option that takes a whole number not below `minimum`."""
    return option(section, *names, type=Whole(min=minimum), default=default, metavar="N", help=help)


def declared(setting: kinds.Setting, **changes: Any) -> Decorator:
    """The option of a setting; `changes`: what this command has otherwise, such as its default."""
    attrs: dict[str, Any] = {"help": setting.help, "metavar": setting.metavar}
    if setting.default is not None:
        attrs["default"] = setting.default
    match setting:
        case kinds.Whole():
            attrs["type"] = Whole(setting.low, setting.high)
        case kinds.Real():
            attrs["type"] = Real(setting.low, setting.high, min_open=setting.above)
        case kinds.Choice():
            attrs |= {"type": click.Choice(setting.choices), "metavar": None}
        case kinds.Flag():
            attrs["is_flag"] = True
        case kinds.Size():
            attrs["type"] = Size()
        case kinds.Pairs():
            attrs["multiple"] = True
    section, name = changes.pop("section", setting.section), changes.pop("name", setting.name)
    return option(section, *setting.flags, name, setting=setting, **attrs | changes)


def declared_list(setting: kinds.Setting, name: str, default: str, **changes: Any) -> Decorator:
    """The option of a setting of which several values are measured, with commas between them."""
    kind: Names
    match setting:
        case kinds.Whole():
            kind = Wholes()
        case kinds.Choice():
            kind = Names(*setting.choices)
        case kinds.Size():
            kind = Sizes()
        case _:
            kind = Names()
    metavar = f"{changes.pop('metavar', setting.metavar)},…"
    return declared(setting, name=name, type=kind, default=default, metavar=metavar, **changes)


def stack(*decorators: Decorator) -> Decorator:
    """All of them, the first outermost."""

    def decorate(function: Callback) -> Callback:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate
