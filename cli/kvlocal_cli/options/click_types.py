"""Types of options: numbers in a range, sizes, lists with commas."""

from __future__ import annotations

import math
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvlocal.setting import MAX_INT, MAX_TOKENS
from kvlocal_cli.options import completers

Param = click.Parameter | None
Context = click.Context | None


class Whole(click.IntRange):
    """A whole number; without a `max`, what llama.cpp's numbers hold is the most."""

    name = "whole number"

    def __init__(self, min: int, max: int = MAX_INT) -> None:
        super().__init__(min=min, max=max)

    def convert(self, value: Any, param: Param, ctx: Context) -> Any:
        # int() also reads "1_000" and other digits
        if not isinstance(value, int) and not re.fullmatch(r"\s*[+-]?[0-9]{1,4000}\s*", str(value)):
            self.fail(f"{_short(value)!r} is not a valid {self.name}.", param, ctx)
        number = int(value)
        low, high = int(self.min or 0), int(self.max or 0)
        if number < low:
            self.fail(f"{_short(number)} is not in the range {self._describe_range()}.", param, ctx)
        if number > high:
            self.fail(f"{_short(number)} is not in the range {low}<=x<={high}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        # nobody comes near the most that llama.cpp takes
        return f"x>={self.min}" if self.max is not None and self.max >= MAX_TOKENS else f"{self.min}<=x<={self.max}"


class Real(click.FloatRange):
    """A finite number."""

    name = "number"

    def convert(self, value: Any, param: Param, ctx: Context) -> Any:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{_short(value)!r} is not a valid {self.name}.", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{_short(value)} is not in the range {self._describe_range()}.", param, ctx)
        return super().convert(number, param, ctx)


class Size(click.types.StringParamType):
    """A budget; in a configuration file it may be a number."""

    name = "size"
    numbers = True


class Names(click.ParamType):
    """`a,b,c` as a tuple; `choices`: what an item may be (anything when empty)."""

    name = "list"

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def convert(self, value: Any, param: Param, ctx: Context) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        items = [item.strip() for item in str(value).split(",")]
        if not all(items):
            self.fail(f"'{value}' is not a list: an item is empty.", param, ctx)
        return tuple(self.item(item, param, ctx) for item in items)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return completers.items_of_list(self.choices, incomplete)

    def item(self, text: str, param: Param, ctx: Context) -> Any:
        if self.choices and text not in self.choices:
            self.fail(f"'{text}' is not one of {', '.join(self.choices)}.", param, ctx)
        return text


class Sizes(Names):
    """`1024,25%` as a tuple of budgets."""

    numbers = True


class Wholes(Names):
    """`0,4096` as a tuple of whole numbers."""

    numbers = True

    def item(self, text: str, param: Param, ctx: Context) -> int:
        if not (text.isascii() and text.isdecimal()):
            self.fail(f"'{_short(text)}' is not a whole number of at least 0.", param, ctx)
        if len(text) > len(str(MAX_INT)) or int(text) > MAX_INT:
            self.fail(f"'{_short(text)}' is not a whole number from 0 to {MAX_INT}.", param, ctx)
        return int(text)


class Lengths(Wholes):
    """`1024,2048` as a tuple of numbers of tokens."""

    def item(self, text: str, param: Param, ctx: Context) -> int:
        length = super().item(text, param, ctx)
        if length < 1:
            self.fail(f"'{text}' is not a length: it must be at least 1 token.", param, ctx)
        return length


class Shares(Names):
    """`0,0.5,1` as a tuple of numbers from 0 to 1."""

    numbers = True

    def item(self, text: str, param: Param, ctx: Context) -> float:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"'{_short(text)}' is not a number from 0 to 1.", param, ctx)
        return share


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:20]}…"
