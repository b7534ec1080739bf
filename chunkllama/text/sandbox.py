"""Run untrusted jinja2 templates: no attribute escapes, bounded time, bounded memory.

A chat template comes with the model folder, so it is an untrusted program. jinja2's immutable
sandbox keeps it from Python's internals; this one also charges everything that can grow, repeat or
take long (loops, calls, filters, operators, comparisons, output) to a budget, so that nested
``range()`` or doubling strings end in an error instead of exhausting the process. Only listed
methods of strings, numbers and containers exist.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chunkllama.text.template_budget import TemplateBudget

_MAX_BITS = 4096  # of a number: the time of arithmetic grows faster than its operands
_METHODS = frozenset(
    """
    capitalize count endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric
    isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace
    rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    values
    """.split()  # noqa: SIM905
)
# Filters whose cost is not bounded by their input's size, or that make no prompt.
_REMOVED_FILTERS = (
    "center", "filesizeformat", "forceescape", "format", "pprint", "random",
    "urlencode", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_SIZED_FILTERS = frozenset({"batch", "slice", "indent", "round", "truncate"})
_COMPARING_FILTERS = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
_COMPARING_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le",
    "lessthan", "lt", "ne",
)  # fmt: skip


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` blocks, which mark the assistant's tokens for training: here they only
    render."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` that stores no underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        for name in (attributes := dict(*args, **kwargs)):
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict(...)`` without the type and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment transformers gives chat templates, every growth and repetition charged to a
    budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=self._emit,
        )
        self._local = threading.local()
        self.filters = {
            name: self._charged(name, function)
            for name, function in (self.filters | {"tojson": self._tojson}).items()
            if name not in _REMOVED_FILTERS
        }
        tests: dict[str, Any] = self.tests
        for name in _COMPARING_TESTS:
            tests[name] = self._comparing(tests[name])
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=self._strftime_now,
            dict=_Dict(),
            namespace=_Namespace,
        )
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)

    def variables_of(self, sources: Iterable[str]) -> frozenset[str]:
        """Names that templates read and do not define themselves."""
        found = (jinja2.meta.find_undeclared_variables(self.parse(source)) for source in sources)
        return frozenset().union(*found)

    @contextmanager
    def budget(self, seconds: float, work: int, output: int) -> Iterator[None]:
        """Limits of the renderings in this block, in this thread."""
        self._local.budget = TemplateBudget(seconds, work, output)
        try:
            yield
        finally:
            del self._local.budget

    def tick(self, num_chars: int) -> str:
        """Runs at each turn of a loop or macro: charges the template text in its body."""
        self._budget.charge(num_chars)
        return ""

    def concat_values(self, *values: Any) -> str:
        """The ``~`` operator."""
        return str(self._sized("".join(map(self._text, values))))

    def whole(self, value: Any) -> Any:
        """A value about to be compared or hashed, all that it holds charged: lists in lists can be
        a thousand times longer than what built them."""
        if hasattr(value, "__next__"):
            value = list(value)
        self._charge_deep(value)
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` is left as it is: ``call`` refuses it like every method it does not
        know."""
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj in (__self.tick, __self.concat_values, __self.whole):
            return __obj(*args)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, LoopContext):  # loop.changed(...)
            args = tuple(map(__self.whole, args))
        elif owner is not None and (isinstance(owner, str) or type(owner).__module__ == "builtins"):
            args = __self._charge_method(owner, __obj.__name__, args)
        return __self._sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._budget.charge(_product_size(left, right))
        if _result_bits(operator, left, right) > _MAX_BITS:
            raise SecurityError(f"a number has more than {_MAX_BITS} bits")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the % operator on strings is not allowed in a chat template")
        return self._sized(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _ChargedNodes().visit(super()._parse(source, name, filename))
        loop: Any
        for loop in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            size = nodes.Const(sum(len(data.data) for data in loop.find_all(nodes.TemplateData)))
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [size], [], None, None)
            loop.body.insert(0, nodes.Output([tick]))
        return template

    @property
    def _budget(self) -> TemplateBudget:
        # Constants are folded at compile time, outside any rendering.
        budget: TemplateBudget | None = getattr(self._local, "budget", None)
        return budget or TemplateBudget(seconds=1.0, work=1 << 16, output=1 << 16)

    def _emit(self, value: Any) -> str:
        text = self._text(value)
        self._budget.emit(len(text))
        return text

    def _text(self, value: Any) -> str:
        """``str(value)``, its size charged before it is built: nested lists can spell gigabytes."""
        self._charge_deep(value)
        return str(value)

    def _charge_deep(self, value: Any) -> None:
        pending: list[Any] = [value] if isinstance(value, list | tuple | dict) else []
        while pending:
            item = pending.pop()
            self._budget.charge(len(item) if isinstance(item, str) else 8)
            if isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                pending += item

    def _charge_method(self, owner: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Charge what a method can make of small arguments, before it does; returns them."""
        if name not in _METHODS:
            raise SecurityError(f"the method {name} is not allowed in a chat template")
        if name == "replace":
            self._charge_replace(owner, args)
        elif name == "join" and args:
            return (self._charge_join(args[0], owner), *args[1:])
        elif name in ("count", "index") and not isinstance(owner, str):
            self._charge_deep(owner)
        return args

    def _charge_replace(self, text: str, args: tuple[Any, ...]) -> None:
        if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self._budget.charge(text.count(args[0]) * len(args[1]))

    def _charge_join(self, items: Any, separator: Any) -> Any:
        """Charge what joins them; returns them, a list if they were not."""
        items = items if isinstance(items, list | tuple | dict | str) else list(items)
        self._charge_deep(items)
        self._budget.charge(len(items) * len(str(separator)))
        return items

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, its result charged, and before it runs what it can make of small
        arguments."""

        @wraps(function)  # keeps jinja's marks of what the filter wants passed first
        def charged(*args: Any, **kwargs: Any) -> Any:
            passed = 1 if hasattr(function, "jinja_pass_arg") else 0
            operands = args[passed:]
            numbers = [*operands[1:], *kwargs.values()]
            if name in _SIZED_FILTERS and any(isinstance(n, int) and n > 1000 for n in numbers):
                raise SecurityError(f"an argument of the filter {name} is above 1000")
            if name == "sum" and any(isinstance(n, list | tuple) for n in numbers):
                raise SecurityError("the filter sum adds numbers only")
            if name in ("tojson", "string"):
                self._charge_deep(operands[0])
            elif name in _COMPARING_FILTERS:
                args = (*args[:passed], self.whole(operands[0]), *operands[1:])
            elif name == "join":
                items = self._charge_join(operands[0], kwargs.get("d", (*operands, "")[1]))
                args = (*args[:passed], items, *operands[1:])
            elif name == "replace":
                self._charge_replace(str(operands[0]), (*operands[1:], *kwargs.values()))
            elif name == "indent":
                width = kwargs.get("width", (*operands, 4)[1])
                size = len(width) if isinstance(width, str) else width
                self._budget.charge(str(operands[0]).count("\n") * size)
            return self._sized(function(*args, **kwargs))

        return charged

    def _sized(self, value: Any) -> Any:
        if isinstance(value, str):
            self._budget.charge(len(value))
        elif isinstance(value, list | tuple | dict):
            self._budget.charge(8 * len(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise SecurityError(f"a number has more than {_MAX_BITS} bits")
        return value

    def _comparing(self, test: Callable[..., bool]) -> Callable[..., bool]:
        """A test (``is eq``), what it compares charged."""
        return lambda *args: test(*map(self.whole, args))

    def _strftime_now(self, format: str) -> str:
        self._budget.charge(256 * len(format))  # a field's width is at most 255
        return datetime.now().strftime(format)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without jinja's HTML escapes, as transformers has it."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None and separators is None:
            return encoder.encode(value)
        parts = []
        for part in encoder.iterencode(value):
            self._budget.charge(len(part))
            parts.append(part)
        return "".join(parts)


class _ChargedNodes(jinja2.visitor.NodeTransformer):
    """What jinja compiles to bare Python, as calls that are charged: ``a ~ b``, comparisons, and
    what is made to be hashed (tuples, keys)."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _method("concat_values", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _method("whole", node.expr)
        for operand in node.ops:
            operand.expr = _method("whole", operand.expr)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _method("whole", node) if node.ctx == "load" else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _method("whole", node.key)
        return node


def _method(name: str, *operands: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment."""
    line = operands[0].lineno
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, list(operands), [], None, None, lineno=line)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store the name {name!r} on a namespace")


def _product_size(left: Any, right: Any) -> int:
    for sequence, factor in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(factor, int):
            return len(sequence) * max(factor, 0) * (1 if isinstance(sequence, str) else 8)
    return 0


def _result_bits(operator: str, left: Any, right: Any) -> int:
    """Of a product or a power of whole numbers; 0 of anything else."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return 0
    if operator == "**":
        return left.bit_length() * max(right, 0)
    return left.bit_length() + right.bit_length() if operator == "*" else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strings_in(value: Any) -> list[str]:
    """Every string in plain data, keys included."""
    found: list[str] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
    return found


def num_chars(value: Any) -> int:
    """Characters of all strings in plain data."""
    return sum(map(len, strings_in(value)))
