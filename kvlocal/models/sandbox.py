"""Jinja as chat templates use it, with an end: bounded source, output, values, and processor time.

A GGUF file brings its template along, so it may be anybody's. Jinja's own sandbox keeps it from Python's insides; this
one also ends templates that loop, or that make texts of gigabytes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20
MAX_VALUE = 1 << 24
"""Most characters of a text, or elements of a list, that a template makes; what it is given comes on top."""
MAX_PARTS = 1 << 17
"""Most elements, at any depth, of a list or dictionary that is written."""
MAX_SECONDS = 10.0
"""Processor time of one rendering."""
_MAX_DEPTH = 64
_WIDTH = 1 << 16  # most columns that text is padded or indented to


class TemplateLimit(SecurityError):
    """A template takes more than any chat template needs."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` of transformers marks what the assistant says; what is in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(NodeTransformer):
    """Calls ``tick`` at the head of every loop and macro, and ``concat_values`` for ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concat_values", node.nodes, node.lineno)

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def _call(self, name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=lineno)
        return nodes.Call(function, args, [], None, None, lineno=lineno)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What templates find: the filters and functions of transformers. One rendering at a time.

    Attributes:
        source: the template's syntax tree, of the last one that was compiled.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._check_output,
            cache_size=0,
        )
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise, "strftime_now": self._strftime_now}
        self.filters |= {"tojson": _tojson, "from_json": json.loads, "fromjson": json.loads}
        self.filters = {name: self._checked(name, function) for name, function in self.filters.items()}
        self.concat = self._concat  # type: ignore[method-assign]
        self.source: nodes.Template | None = None
        self._now = datetime.now()
        self._limit, self._end = MAX_VALUE, time.thread_time() + MAX_SECONDS

    def compile_template(self, source: str) -> jinja2.Template:
        """A template; :attr:`source` is its tree as it was written.

        Raises:
            Exception: whatever Jinja says of one that does not compile. TemplateLimit: it is too long.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateLimit(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        self.begin(0)
        self.source = super()._parse(source, None, None)
        return self.from_string(source)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return tree

    def begin(self, n_input: int, now: datetime | None = None) -> None:
        """Start a rendering of ``n_input`` characters: its limits, and the time that it sees."""
        self._limit, self._end = MAX_VALUE + 4 * n_input, time.thread_time() + MAX_SECONDS
        self._now = now or datetime.now()

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text of a template, within the limits that :meth:`begin` has set."""
        pieces, size = [], 0
        for piece in template.root_render_func(template.new_context(dict(variables))):
            size += len(piece)
            self._check_size(size)
            self.tick()
            pieces.append(piece)
        return "".join(pieces)

    def tick(self) -> str:
        if time.thread_time() > self._end:
            raise TemplateLimit(f"it runs for more than {MAX_SECONDS:g} seconds")
        return ""

    def concat_values(self, *values: Any) -> str:
        """``a ~ b ~ c``."""
        return self._concat([self._check_output(value) for value in values])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._check_size(_size(left) * _number(right) if _size(left) else _size(right) * _number(left))
        elif operator == "+":
            self._check_size(_size(left) + _size(right))
        elif operator == "**" and (_number(left) > 1 << 32 or _number(right) > 64):
            raise TemplateLimit(f"it computes {left} ** {right}")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            self._check_call(getattr(method, "__name__", ""), text, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def _checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments are checked first; what Jinja passes it before the value stays in front."""
        passes = getattr(function, "jinja_pass_arg", None)
        skip = 0 if passes is None else 1

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_call(name, args[skip] if len(args) > skip else "", args[skip + 1 :], kwargs)
            return function(*args, **kwargs)

        if passes is not None:
            checked.jinja_pass_arg = passes  # type: ignore[attr-defined]
        return checked

    def _check_call(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Methods of texts and filters whose result may be far longer than what they are given."""
        given = [*args, *kwargs.values()]
        size = _size(value)
        if name in _PADS and any(_number(number) > _WIDTH for number in given):
            raise TemplateLimit(f"{name} is given a width of more than {_WIDTH}")
        if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(value, str):
            self._check_size(size + value.count(args[0]) * _size(args[1]))
        elif name == "join":
            items = next((v for v in (value, *args) if isinstance(v, (list, tuple))), ())
            glue = next((v for v in (value, *args) if isinstance(v, str)), "")
            self._check_size(sum(_size(item) for item in items) + len(glue) * len(items))
        elif name in ("indent", "wordwrap") and isinstance(value, str):
            self._check_size(size + (value.count("\n") + 1) * max([_size(v) + _number(v) for v in given], default=4))
        elif name in ("tojson", "string", "pprint", "xmlattr", "urlencode"):
            self._check_output(value)
        elif name in ("format", "format_map") and isinstance(value, str):
            _check_format(value)

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise TemplateLimit(f"it makes a text or a list of {size}, more than {self._limit}")

    def _check_output(self, value: Any = "") -> Any:
        """``value``, if it can be written: lists that hold themselves many times over are endless as a text."""
        if isinstance(value, (str, int, float)):
            return value
        n, stack = 0, [(value, 0)]
        while stack:
            item, depth = stack.pop()
            n += 1
            if n > MAX_PARTS or depth > _MAX_DEPTH:
                raise TemplateLimit(f"it writes a value of more than {MAX_PARTS} parts, or {_MAX_DEPTH} deep")
            if isinstance(item, Mapping):
                stack += [(part, depth + 1) for pair in item.items() for part in pair]
            elif isinstance(item, (list, tuple, set)):
                stack += [(part, depth + 1) for part in item]
        return value

    def _concat(self, values: Iterable[Any]) -> str:
        texts = [value if isinstance(value, str) else str(value) for value in values]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def _strftime_now(self, form: str) -> str:
        if len(form) > 256:
            raise TemplateLimit("strftime_now is given more than 256 characters")
        return self._now.strftime(form)


_PADS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "tojson", "truncate"})
_PADS |= {"batch", "slice"}


_WIDE = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


def _check_format(form: str) -> None:
    if _WIDE.search(form):
        raise TemplateLimit("it formats with a width of more than four digits, or one that is computed")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set, range)) else 0


def _number(value: Any) -> int:
    return min(abs(int(value)), 1 << 62) if isinstance(value, (int, float)) and value == value else 0


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
