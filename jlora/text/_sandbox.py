"""Where the programs of chat templates run: no way out of the sandbox, and an end to what they do.

Jinja's sandbox keeps a template from Python's internals and from changing what it is given. Steps, numbers and texts
that grow without an end are stopped here: every turn of a loop, every call of a macro and all that is written is
counted, and each text that is put together is of bounded length.
"""

import datetime
import functools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

OPENS, CLOSES = "\ufdd0", "\ufdd1"  # around what the assistant says; Unicode keeps them for such a use
MOST_STEPS, MOST_SECONDS = 100_000, 5.0
MOST_CHARACTERS, MOST_WIDTH, MOST_BITS = 32 << 20, 100_000, 4096


class RefusalError(Exception):
    """What a template itself says is wrong with the messages, by `raise_exception`."""


class _Watch(Extension):
    """The tag `generation`, and the count of steps."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.begin()

    def begin(self) -> None:
        self._steps = self._characters = 0
        self._until = time.monotonic() + MOST_SECONDS

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPENS}{caller()}{CLOSES}"

    def step(self, characters: int) -> None:
        """One turn of a loop, or one call of a macro, with as many characters of the template in it."""
        self._steps += 1
        self._wrote(characters)
        if self._steps > MOST_STEPS:
            raise SecurityError(f"more than {MOST_STEPS:,} steps")
        if time.monotonic() > self._until:
            raise SecurityError(f"more than {MOST_SECONDS:.0f} seconds")

    def written(self, value: Any) -> str:
        """A value that is written, be it into a macro's result or a variable."""
        text = value if isinstance(value, str) else _written(value)
        self._wrote(len(text))
        return text

    def joined(self, *parts: Any) -> str:
        """What `~` puts together."""
        return _join(map(_written, parts))

    def _wrote(self, characters: int) -> None:
        self._characters += characters
        if self._characters > MOST_CHARACTERS:
            raise SecurityError(f"more than {MOST_CHARACTERS:,} characters")


class _Counting(NodeTransformer):
    """Puts counts into the body of every loop and macro, and around all that is written or put together."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    def visit_For(self, node: Any) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Macro(self, node: Any) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_CallBlock(self, node: Any) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Output(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        for number, child in enumerate(node.nodes):
            if not isinstance(child, nodes.TemplateData):
                node.nodes[number] = self._watch.call_method("written", [child], lineno=child.lineno)
        return node

    def visit_Concat(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._watch.call_method("joined", node.nodes, lineno=node.lineno)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        characters = nodes.Const(sum(len(text.data) for text in node.find_all(nodes.TemplateData)))
        step = self._watch.call_method("step", [characters], lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which numbers and texts do not grow without an end either."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        grows = {"+": _sum_grows, "*": _product_grows, "**": _power_grows, "%": _format_grows}
        if grows[operator](left, right):
            raise SecurityError(f"{operator} makes too much")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # format is wrapped
        if isinstance(owner, str):
            _check_call(getattr(obj, "__name__", ""), (owner, *args), kwargs)
        return super().call(context, obj, *args, **kwargs)


class Sandbox:
    """Compiles and runs templates."""

    def __init__(self, now: datetime.datetime | None) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Watch, loopcontrols])
        environment.filters.update({name: _bounded(name, each) for name, each in environment.filters.items()})
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(form),
            "namespace": _Namespace,
        }
        del environment.globals["lipsum"]  # as much text as is asked for
        self._environment = environment
        self._watch: Any = environment.extensions[_Watch.identifier]
        self._lock = threading.Lock()

    def compile(self, source: str) -> jinja2.Template:
        """A template; an error of Jinja's where it is none."""
        parsed = _Counting(self._watch).visit(self._environment.parse(source))
        code = self._environment.compile(parsed)
        return self._environment.template_class.from_code(self._environment, code, self._environment.globals)

    def has_marks(self, source: str) -> bool:
        """Whether a template has the tag `generation`."""
        calls = self._environment.parse(source).find_all(nodes.ExtensionAttribute)
        return any(call.name == "_marked" for call in calls)

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """What a template writes."""
        with self._lock:  # one count of steps
            self._watch.begin()
            return _join(template.generate(variables))


class _Namespace(Namespace):
    """Jinja's, without a way to Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a key may be "self"
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"{name!r} of a namespace begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise RefusalError(str(message))


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if isinstance(indent, int):
        _check_width(indent)
    _check_size(x)
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that refuses widths and counts that are too large."""

    @functools.wraps(function)  # with the note for Jinja of what it is passed first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0
        if name == "join":
            args = (*args[:passed], list(args[passed]), *args[passed + 1 :])
        if name not in ("default", "d"):
            _check_call(name, args[passed:], kwargs)
        return function(*args, **kwargs)

    return bounded


def _check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a call of a filter, or of a method of a text, that would make too much."""
    texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, int):
            _check_width(value)
    if name == "replace" and len(texts) == 3 and (len(texts[0]) + 1) * len(texts[2]) > MOST_CHARACTERS:
        raise SecurityError("replace makes too much")
    if name in ("format", "format_map") and _has_width(texts[0] if texts else ""):
        raise SecurityError("format makes too much")
    if name == "join" and args:
        parts = args[0] if isinstance(args[0], list) else [args[0], *(args[1] if len(args) > 1 else ())]
        between = sum(map(len, texts)) * len(parts)
        if between + sum(len(part) for part in parts if isinstance(part, str)) > MOST_CHARACTERS:
            raise SecurityError("join makes too much")


def _check_width(value: int) -> None:
    if abs(value) > MOST_WIDTH:
        raise SecurityError(f"{value} is too large")


def _has_width(form: str) -> bool:
    """Whether a text that is a format asks for a width of more than four digits, or for one that it is given."""
    run = 0
    for character in form:
        run = run + 1 if character.isdigit() else 0
        if run > 4 or character == "*":
            return True
    return False


def _sum_grows(left: Any, right: Any) -> bool:
    return hasattr(left, "__len__") and hasattr(right, "__len__") and len(left) + len(right) > MOST_CHARACTERS


def _product_grows(left: Any, right: Any) -> bool:
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            return len(one) * other > MOST_CHARACTERS
    return isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MOST_BITS


def _power_grows(left: Any, right: Any) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_BITS


def _format_grows(left: Any, right: Any) -> bool:
    return isinstance(left, str) and _has_width(left)


def _written(value: Any) -> str:
    _check_size(value)
    return str(value)


def _check_size(value: Any) -> None:
    """Refuses a value whose text would be too long; what stands in many places counts in each."""
    left = [value]
    size = 0
    while left:
        value = left.pop()
        size += 16 + (len(value) if isinstance(value, str) else 0)
        if size > MOST_CHARACTERS:
            raise SecurityError(f"more than {MOST_CHARACTERS:,} characters")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def _join(parts: Any) -> str:
    """Texts put together, while they are not too long."""
    found, length = [], 0
    for part in parts:
        found.append(part)
        length += len(part)
        if length > MOST_CHARACTERS:
            raise SecurityError(f"more than {MOST_CHARACTERS:,} characters")
    return "".join(found)
