"""Running a chat template that came with a checkpoint: no escape, no flood, no endless loop.

Jinja's immutable sandbox keeps templates from reaching Python; it does not bound what they compute.
Here every loop round and call looks at the clock, and every operation that can make a large value
from small ones (products, sums, joins, paddings, list displays) is measured first. Filters and
globals that chat templates have no use for and that cannot be measured are absent.
Source: jinja2.sandbox; extras as in transformers utils/chat_template_utils.py.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARS = 256 * 1024
MAX_SIZE = 8 * 2**20  # characters and items that one value, or the output, may hold
MAX_SECONDS = 2.0
MAX_INT_BITS = 4096
MAX_DEPTH = 64

PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs")
WIDE_PRINTF, WIDE_BRACES = r"\*|\d{4}", r"\d{4}|:[^{}]*\{"
FORBIDDEN_METHODS = ("translate", "maketrans", "to_bytes", "fromhex")
FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min",
    "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title",
    "trim", "unique", "upper",
)  # fmt: skip


class LimitExceeded(jinja2.TemplateError):
    """A template computes too much."""


class RaisedByTemplate(jinja2.TemplateError):
    """A template called raise_exception."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment for one template at a time and thread."""

    intercepted_binops = frozenset({"*", "+", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, GenerationTag],
        )
        self._clock = threading.local()
        known = {name: self._guarded(self.filters[name]) for name in FILTERS}
        self.filters = {
            **known,
            "tojson": to_json, "sum": self._sum, "join": self._join, "indent": indent,
            "round": bounded_round, "replace": replace_text, "format": format_text,
            "bounded_": bounded, "joined_": self._joined, "ticking_": self._ticking,
        }  # fmt: skip
        keep = ("range", "joiner", "cycler")
        self.globals = {name: self.globals[name] for name in keep}
        self.globals.update(
            raise_exception=raise_exception, strftime_now=strftime_now, dict=_make_dict,
            namespace=QuietNamespace,
        )  # fmt: skip
        self.concat = bounded_concat

    def start_clock(self) -> None:
        """Give the render or compilation that follows on this thread its time."""
        self._clock.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Raises: LimitExceeded when this thread's time is used up."""
        if time.monotonic() > getattr(self._clock, "deadline", float("inf")):
            raise LimitExceeded(f"it runs longer than {MAX_SECONDS:.0f} s")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return MeasureGrowth().visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        check_call(__obj, args, kwargs)
        return bounded(super().call(__context, __obj, *args, **kwargs))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return bounded(function(*args, **kwargs))

        return wrapper

    def _ticking(self, items: Any) -> Any:
        if isinstance(items, jinja2.Undefined) or not isinstance(items, Iterable):
            return items
        return Ticking(items, self.tick)

    def _joined(self, first: Any, *rest: Any) -> str:
        self.tick()
        size = sum(measure(value) for value in (first, *rest))
        if size > MAX_SIZE:
            raise LimitExceeded(f"it makes a text of {size} characters")
        return "".join(map(str, (first, *rest)))

    def _join(self, items: Any, separator: Any = "", attribute: Any = None) -> str:
        values = []
        for item in items:
            self.tick()
            values.append(item if attribute is None else self.getitem(item, attribute))
        separator = str(separator)
        if measure(values) + len(values) * len(separator) > MAX_SIZE:
            raise LimitExceeded(f"join makes a text of more than {MAX_SIZE} characters")
        return separator.join(map(str, values))

    def _sum(self, items: Any, attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        values = list(items)
        if not all(isinstance(v, (int, float)) for v in [*values, start]):
            raise LimitExceeded("sum takes numbers only")
        return sum(values, start)


class Ticking:
    """An iterable that looks at the clock each round; keeps the length where there is one."""

    def __init__(self, items: Iterable[Any], tick: Callable[[], None]) -> None:
        self.items, self.tick = items, tick

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.tick()
            yield item

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; what is inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class MeasureGrowth(NodeTransformer):
    """Sends joins, displays and loops, which the sandbox cannot intercept, through filters."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return _filter("joined_", first, node, rest)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _constant(node.items) else _filter("bounded_", node, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        fixed = node.ctx != "load" or _constant(node.items)
        return node if fixed else _filter("bounded_", node, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        fixed = _constant([pair.value for pair in node.items])
        return node if fixed else _filter("bounded_", node, node)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter("ticking_", cast(nodes.Expr, node.iter), node)
        return node


class QuietNamespace(Namespace):
    """Jinja's namespace without private names, printed and measured as one item."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            QuietNamespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        QuietNamespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"

    @staticmethod
    def _check(name: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise LimitExceeded(f"it stores the private name {str(name)[:40]!r}")


def measure(value: Any) -> int:
    """Characters and items of a value printed in full; shared parts count each time they appear.

    Raises: LimitExceeded for values nested deeper than MAX_DEPTH or larger than MAX_SIZE.
    """
    return _measured(value, {}, 0)


def _measured(value: Any, known: dict[int, int], depth: int) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if isinstance(value, dict):
        parts: Iterable[Any] = (part for pair in value.items() for part in pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return 8 * len(value) if isinstance(value, range) else 16
    if id(value) not in known:
        if depth > MAX_DEPTH:
            raise LimitExceeded(f"it nests values deeper than {MAX_DEPTH}")
        size = 1
        for part in parts:
            size += 1 + _measured(part, known, depth + 1)
            if size > MAX_SIZE:
                raise LimitExceeded(f"it makes a value of more than {MAX_SIZE} items")
        known[id(value)] = size
    return known[id(value)]


def bounded(value: Any) -> Any:
    """The value itself, once measured. Raises: LimitExceeded."""
    if isinstance(value, (str, bytes, int, list, tuple, dict, set)) and measure(value) > MAX_SIZE:
        raise LimitExceeded(f"it makes a value of more than {MAX_SIZE} items")
    return value


def bounded_concat(parts: Iterable[str]) -> str:
    """Join what a block has printed. Raises: LimitExceeded above MAX_SIZE characters."""
    pieces, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_SIZE:
            raise LimitExceeded(f"it prints more than {MAX_SIZE} characters")
        pieces.append(part)
    return "".join(pieces)


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises: LimitExceeded if left operator right would be too large."""
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == "%":
        if isinstance(left, (str, bytes)):
            check_format(str(left), (right,), WIDE_PRINTF)
        return
    if operator == "**":
        size = max(left.bit_length(), 1) * abs(right) if integers else 0
        limit = MAX_INT_BITS
    elif integers:
        size, limit = left.bit_length() + right.bit_length(), MAX_INT_BITS
    elif operator == "+":
        size, limit = measure(left) + measure(right), MAX_SIZE
    else:
        many, times = (left, right) if isinstance(right, int) else (right, left)
        size, limit = measure(many) * times if isinstance(times, int) else 0, MAX_SIZE
    if size > limit:
        raise LimitExceeded(f"{operator} makes a value of size {size}")


def check_format(template: str, values: tuple[Any, ...], forbidden: str) -> None:
    """Raises: LimitExceeded for wide fields, or a result that may be too large."""
    if re.search(forbidden, template):
        raise LimitExceeded("it formats with a width that is computed or has four digits")
    fields = template.count("%") + template.count("{")
    if len(template) + fields * (10 + measure(list(values))) > MAX_SIZE:
        raise LimitExceeded("it formats a text that is too long")


def check_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises: LimitExceeded if a text method would make too large a result."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name in ("format", "format_map"):
        template = getattr(getattr(function, "__wrapped__", None), "__self__", None)
        if not isinstance(template, str):
            raise LimitExceeded("it formats something that is not a text")
        check_format(template, (args, kwargs), WIDE_BRACES)
        return
    if not isinstance(owner, (str, bytes, int, float)):
        return
    if name in FORBIDDEN_METHODS:
        raise LimitExceeded(f"the method {name} is not available")
    if name in PADDING_METHODS:
        numbers = [v for v in (*args, *kwargs.values()) if isinstance(v, int)]
        tabs = str(owner).count("\t") if name == "expandtabs" else 1
        size = len(str(owner)) + tabs * max([8, *map(abs, numbers)])
    elif name == "replace" and len(args) >= 2:
        size = replaced_size(str(owner), str(args[0]), str(args[1]))
    elif name == "join" and args:
        if not isinstance(args[0], (str, list, tuple, dict)):
            raise LimitExceeded("join takes a list")
        size = measure(args[0]) + len(args[0]) * len(str(owner))
    else:
        return
    if size > MAX_SIZE:
        raise LimitExceeded(f"{name} makes a text of {size} characters")


def replaced_size(text: str, old: str, new: str) -> int:
    found = text.count(old) if old else len(text) + 1
    return len(text) + found * len(new)


def replace_text(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's replace. Raises: LimitExceeded."""
    text, old, new = str(bounded(text)), str(old), str(new)
    if replaced_size(text, old, new) > MAX_SIZE:
        raise LimitExceeded(f"replace makes a text of more than {MAX_SIZE} characters")
    return text.replace(old, new, -1 if count is None else count)


def format_text(template: Any, *args: Any, **kwargs: Any) -> str:
    """Jinja's format, printf style. Raises: LimitExceeded."""
    check_format(str(template), (args, kwargs), WIDE_PRINTF)
    return str(template) % (kwargs or args)


def to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as transformers prints it: no HTML escapes, no ASCII escapes."""
    measure(value)
    if isinstance(indent, (int, str)) and (indent if isinstance(indent, int) else len(indent)) > 16:
        raise LimitExceeded("tojson with an indent above 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:  # noqa: FBT001, FBT002
    """Jinja's indent, at most 100 wide."""
    wide = width if isinstance(width, int) else len(width)
    if wide > 100 or (str(text).count("\n") + 1) * wide > MAX_SIZE:
        raise LimitExceeded(f"indent by {wide}")
    return jinja2.filters.do_indent(str(text), width, first, blank)


def bounded_round(value: float, precision: int = 0, method: Any = "common") -> float:
    """Jinja's round, at most 100 digits."""
    if abs(int(precision)) > 100:
        raise LimitExceeded(f"round to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)


def raise_exception(message: Any) -> None:
    raise RaisedByTemplate(str(message))


def strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"\d{3}", form):
        raise LimitExceeded("strftime_now with too long a format")
    return datetime.now().astimezone().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _filter(
    name: str, value: nodes.Expr, origin: nodes.Node, args: list[nodes.Expr] | None = None
) -> nodes.Filter:
    return nodes.Filter(value, name, args or [], [], None, None, lineno=origin.lineno)


def _constant(items: Iterable[nodes.Node]) -> bool:
    return all(isinstance(item, nodes.Const) for item in items)
