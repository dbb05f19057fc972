"""Jinja templates that nobody vouches for: rendered without access to anything, within bounds of text and work.

jinja2's sandbox keeps templates from Python's internals. It bounds neither memory nor time, so here filters and methods
are those of a list, each loop, call and operation counts as a step, and what would make a long text is refused before
it is made. What is compared or looked up counts with all that it has within: few lists within each other are enough for
a comparison without end. One operation may still take as long as the texts that it is given are long.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized, ValuesView
from typing import Any, ClassVar, NamedTuple, NoReturn

from jinja2 import Template, TemplateError, TemplateRuntimeError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

MAX_CHARS = 2**22
"""Characters of any text that a template makes."""
MAX_STEPS = 1_000_000
"""Steps of one rendering: operations, iterations, and elements and thousands of characters that these make."""

_MAX_BITS = 4096  # of integers
_MAX_DEPTH = 100  # of values within each other; Python's hash of tuples overflows the stack, at some 10,000s
_CHARS_PER_STEP = 1024
_FILTERS = re.compile(
    "abs|capitalize|d|default|dictsort|first|float|int|items|last|list|lower|map|max|min|reject|rejectattr|reverse|round"
    "|safe|select|selectattr|sort|title|trim|truncate|unique|upper"
)
_SHALLOW_FILTERS = re.compile(
    "abs|d|default|first|float|int|items|last|list|map|reject|rejectattr|reverse|round|select|selectattr"
)
_SHALLOW_TESTS = re.compile(
    "boolean|callable|defined|escaped|false|float|integer|iterable|mapping|none|number|sameas|sequence|string|true"
    "|undefined"
)
_STR_METHODS = re.compile(
    "capitalize|count|endswith|find|index|isalnum|isalpha|isascii|isdigit|islower|isspace|isupper|join|lower|lstrip"
    "|partition|removeprefix|removesuffix|replace|rfind|rindex|rpartition|rsplit|rstrip|split|splitlines|startswith|strip"
    "|title|upper"
)

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps_left")


class JSONText(dict[str, Any]):
    """An object that `tojson` writes as the text that it was read from."""

    def __init__(self, text: str) -> None:
        """From the JSON text of an object."""
        super().__init__(json.loads(text))
        self.text = text


class Compiled(NamedTuple):
    """A template."""

    render: Callable[[Mapping[str, Any]], str]
    """From variables to text; raises whatever a template may lead to."""
    reads: frozenset[str]
    """Names of variables that it reads."""
    render_marked: Callable[[Mapping[str, Any]], str] | None
    """`render`, with `BEGIN_GENERATION` and `END_GENERATION` around what {% generation %} marks; None without marks."""


BEGIN_GENERATION, END_GENERATION = "\ue000\ue002", "\ue000\ue003"  # of the private use area: no text has them


def compile_template(source: str) -> Compiled:
    """Compiles a template. Raises TemplateError if it is none."""
    _steps_left.set([MAX_STEPS])
    sandbox, marking = _Sandbox(), _Sandbox(marks_generation=True)
    parsed = sandbox.parse(source)

    def renderer(template: Template) -> Callable[[Mapping[str, Any]], str]:
        def render(variables: Mapping[str, Any]) -> str:
            _steps_left.set([MAX_STEPS])
            return _joined(template.generate(dict(variables)))

        return render

    marked = renderer(marking.from_string(source)) if sandbox.has_generation else None
    return Compiled(renderer(sandbox.from_string(source)), frozenset(find_undeclared_variables(parsed)), marked)


def _spend(num_steps: int = 1) -> None:
    left = _steps_left.get()
    left[0] -= num_steps
    if left[0] < 0:
        raise TemplateRuntimeError(f"it takes more than {MAX_STEPS} steps")


def _spend_on_text(num_chars: int) -> None:
    """Steps for a text of this length, which may be yet to be made."""
    if num_chars > MAX_CHARS:
        raise TemplateRuntimeError(f"it makes a text of more than {MAX_CHARS} characters")
    _spend(1 + num_chars // _CHARS_PER_STEP)


def _spend_on(value: Any) -> Any:
    """The value, after steps for what it has."""
    if isinstance(value, str):
        _spend_on_text(len(value))
    else:
        _spend(1 + len(value) if isinstance(value, Sized) else 1)
    return value


def _measure(value: Any) -> int:
    """Characters of all texts within a value, and one for any other part; each part is a step."""
    todo, num_chars = [(value, 0)], 0
    while todo:
        part, depth = todo.pop()
        parts: Iterable[Any] = ()
        if isinstance(part, Mapping):
            parts = [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | Set | ValuesView):
            parts = part
        if depth > _MAX_DEPTH:
            raise TemplateRuntimeError(f"it has values within each other, more than {_MAX_DEPTH} deep")
        todo += [(inner, depth + 1) for inner in parts]
        num_chars += len(part) if isinstance(part, str) else 1
        _spend()
    return num_chars


def _measured(value: Any) -> Any:
    """What is compared, looked up or written, after steps for all that it has within."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        value = _counted(value)
    _spend_on_text(_measure(value))
    return value


def _text(value: Any) -> str:
    """The value as text. Its parts are counted first: objects within each other may be few and their text huge."""
    _spend_on_text(_measure(value))
    return str(value)


def _joined(parts: Iterable[Any], separator: str = "") -> str:
    texts, num_chars = [], 0
    for part in parts:
        texts.append(_text(part))
        num_chars += len(texts[-1]) + len(separator)
        if num_chars > MAX_CHARS:
            break
    _spend_on_text(num_chars)
    return separator.join(texts)


def _replaced(text: str, old: str, new: str, count: int | None = -1) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    _spend_on_text(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = " " * min(width, 64) if isinstance(width, int) else _text(width)
    lines = _text(text).splitlines() or [""]
    _spend_on_text(len(text) + len(lines) * len(space))
    rest = "\n".join(space + line if line or blank else line for line in lines[1:])
    return (space if first else "") + lines[0] + ("\n" + rest if len(lines) > 1 else "")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: JSON without escapes of HTML."""
    if isinstance(value, JSONText) and indent is None and not (ensure_ascii or sort_keys):
        return value.text
    _text(value)
    indent = None if indent is None else min(int(indent), 8)
    return _spend_on(
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


def _length(value: Any) -> int:
    """Of nothing, 0: the tools of a request without tools are none."""
    return 0 if value is None else len(value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _counted(value: Any) -> Any:
    """What a loop goes over."""
    return _spend_on(value if isinstance(value, Sized) else list(value))


def _counting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with what jinja2 notes about its arguments
    def counting(*args: Any, **kwargs: Any) -> Any:
        return _spend_on(function(*args, **kwargs))

    return counting


def _measuring(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def measuring(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_measured, args), **{name: _measured(value) for name, value in kwargs.items()})

    return measuring


class _Generation(Extension):
    """{% generation %}, by which trainers find the assistant's tokens, stands for its body, between marks if asked."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        environment = self.environment
        assert isinstance(environment, _Sandbox)
        environment.has_generation = True
        if not environment.marks_generation:
            return body
        begin, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN_GENERATION, END_GENERATION)
        )
        return [begin, *body, end]


class _Compiler(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(")
        self._visit_measured(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_measured(operand.expr, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("{")
        for item in node.items:
            self._visit_measured(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _visit_measured(self, node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.measured(")
        self.visit(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Compiler
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined)
    measured = staticmethod(_measured)

    def __init__(self, *, marks_generation: bool = False) -> None:
        self.marks_generation, self.has_generation = marks_generation, False
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=lambda value: value if isinstance(value, Undefined) else _text(value),
            optimized=False,
            cache_size=0,
        )
        self.filters = {name: _counting(self.filters[name]) for name in self.filters if _FILTERS.fullmatch(name)}
        for functions, shallow in ((self.filters, _SHALLOW_FILTERS), (self.tests, _SHALLOW_TESTS)):
            functions |= {name: _measuring(functions[name]) for name in functions if not shallow.fullmatch(name)}
        self.filters |= {"count": _length, "length": _length, "tojson": _tojson, "replace": _replaced, "string": _text}
        self.filters |= {
            "indent": _indented,
            "join": lambda parts, d="", attribute=None: self._join(parts, d, attribute),
        }
        self.filters["counted"] = _counted
        self.globals = {
            "range": safe_range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
        }

    def _join(self, parts: Any, separator: str, attribute: str | None) -> str:
        found = parts if attribute is None else (self.getitem(part, attribute) for part in parts)
        return _joined(found, _text(separator))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return template

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, argument if isinstance(argument, str | int) else _measured(argument))

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return super().call_filter(_text(name), *args, **kwargs)

    def call_test(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return super().call_test(_text(name), *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return _STR_METHODS.fullmatch(attr) is not None
        if isinstance(obj, int | float | complex | bytes | tuple | range):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No format methods: their widths make texts of any length."""
        return None

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        _spend()
        if isinstance(owner, str) and name == "join":
            return _joined(*args, separator=owner)
        if isinstance(owner, str) and name == "replace":
            return _replaced(owner, *args, **kwargs)
        if not isinstance(obj, LoopContext | Macro):
            args, kwargs = tuple(map(_measured, args)), {key: _measured(value) for key, value in kwargs.items()}
        if isinstance(owner, list):  # index and count
            _measured(owner)
        return _spend_on(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _spend()
        if operator == "%" and isinstance(left, str):
            raise TemplateRuntimeError("it formats a text with %, which is not supported")
        if isinstance(left, int) and isinstance(right, int):
            factor = right if operator == "**" else 1
            if operator in ("*", "**") and left.bit_length() * max(factor, 1) + right.bit_length() > _MAX_BITS:
                raise TemplateRuntimeError("it makes an integer that is too large")
        elif operator == "*":
            sequence, number = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(sequence, Sequence) and isinstance(number, int):
                _spend_length(sequence, len(sequence) * max(number, 0))
        elif operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
            _spend_length(left, len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _spend_length(sequence: Sequence[Any], length: int) -> None:
    """Steps for a longer sequence of the same kind."""
    if isinstance(sequence, str):
        _spend_on_text(length)
    else:
        _spend(length)
