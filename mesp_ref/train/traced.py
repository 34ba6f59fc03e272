"""Text that knows which of its characters are data, and a sandbox for templates that keeps track.

A chat template weaves the words of a conversation into text of its own. Which is which decides what
is learned and what may stand for a control token, and no mark inside the text can tell it: whoever
writes the words could write the mark. So the strings of a record go into the template as `Traced`,
a `str` that carries the places of its data beside the characters. What is cut from one or joined
with one keeps the places; what is made from one in another way is data throughout. The text itself
is, to the letter, that of an untraced rendering.

Source    Jinja's immutable sandbox, with less in it: a template prints texts, numbers, lists and
          objects of JSON, never a function or another object of Python
"""

import functools
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from string import Formatter
from typing import Any, Self, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

Span = tuple[int, int, int]  # start, stop, source
_CHUNK = 4096
OTHER = -1  # the source of data that is no message's, or several sources'

_LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_SELECTING = frozenset(["attr", "d", "default", "first", "last", "max", "min", "random"])
_NEEDLESS = ("cycler", "joiner", "lipsum")


class Traced(str):
    """A text with the spans of it that are data, and those that a `{% generation %}` block says.

    A span that is empty stays: it tells where an empty message stands. Without spans given, all of
    the text is data of a source unknown.
    """

    __slots__ = ("_said", "_spans")
    _spans: tuple[Span, ...]
    _said: tuple[Span, ...]

    def __new__(
        cls, text: str = "", spans: Iterable[Span] | None = None, said: Iterable[Span] = ()
    ) -> Self:
        new = super().__new__(cls, text)
        new._spans = ((0, len(text), OTHER),) if spans is None else tuple(spans)
        new._said = tuple(said)
        return new

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            place = key.__index__()
            place += len(self) if place < 0 else 0
            super().__getitem__(place)  # its IndexError
            return self._piece(place, place + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._piece(start, stop)
        return joined(self._piece(i, i + 1) for i in range(start, stop, step))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __mul__(self, count: SupportsIndex) -> str:
        return joined([self] * count.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return _data(str.__mod__(self, values), sources([self, values]))

    def __rmod__(self, text: str) -> str:
        return _data(str.__mod__(text, self), sources(self))

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._piece(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._piece(0, len(super().rstrip(chars)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._pieces(super().splitlines(keepends), None)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._pieces(super().partition(sep), "")
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._pieces(super().rpartition(sep), "")
        return first, middle, last

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return _data(super().replace(old, new, count), sources([self, new]))
        return joined(self.split(old, count), new)

    def _piece(self, start: int, stop: int) -> str:
        """The characters from start to stop; an empty piece of data stays a place of that data."""
        if stop <= start:
            kept: Iterable[Span] = [(0, 0, source) for _, _, source in self._spans[:1]]
            return Traced("", kept)
        said = _clip(self._said, start, stop)
        return Traced(
            super().__getitem__(slice(start, stop)), _clip(self._spans, start, stop), said
        )

    def _pieces(self, parts: Iterable[str], sep: str | None) -> list[str]:
        """What a split found, in order, with `sep` (None: white space) between."""
        found: list[str] = []
        stop = 0
        for part in parts:
            start = stop + len(sep) if sep and found else stop
            start = self.find(part, stop) if sep is None else start
            stop = start + len(part)
            found.append(self._piece(start, stop))
        return found


def _made_from(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    @functools.wraps(method)
    def call(self: Traced, *args: Any, **named: Any) -> Any:
        found = method(self, *args, **named)
        if not isinstance(found, str):
            return found
        if name in _BY_LETTER and len(found) == len(self):
            return Traced(found, self._spans, self._said)
        return _data(found, sources([self, *args]))

    return call


# They leave each letter in its place, unless one becomes two.
_BY_LETTER = frozenset(["capitalize", "casefold", "lower", "swapcase", "title", "upper"])
for _name in dir(str):  # whatever else makes a text from a text: upper, zfill, removeprefix, …
    if not _name.startswith("_") and _name not in vars(Traced):
        setattr(Traced, _name, _made_from(_name))


def _clip(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    return [
        (max(a, start) - start, min(b, stop) - start, source)
        for a, b, source in spans
        if (a < stop and b > start) or (a == b and start <= a <= stop)
    ]


def joined(parts: Iterable[Any], sep: str = "") -> str:
    """All parts as one text, `sep` between them, each with its spans."""
    texts: list[str] = []
    chunks: list[str] = []  # texts that are joined already: a million parts need not live at once
    spans: list[Span] = []
    said: list[Span] = []
    at = 0
    for part in parts:
        for piece in (sep, part) if texts and sep else (part,):
            text = piece if isinstance(piece, str) else printed(piece)
            if isinstance(text, Traced):
                spans += [(a + at, b + at, source) for a, b, source in text._spans]
                said += [(a + at, b + at, source) for a, b, source in text._said]
            texts.append(text)
            at += len(text)
        if len(texts) > _CHUNK:
            chunks.append("".join(texts[:-1]))
            del texts[:-1]
    whole = "".join(chunks + texts)
    return Traced(whole, spans, said) if spans or said else whole


def said(text: str) -> Traced:
    """A text that the assistant says, by the word of the template."""
    return Traced(text, spans_of(text), [(0, len(text), OTHER)])


def plain(text: str) -> str:
    """The characters alone."""
    return str.__str__(text)


def spans_of(text: str) -> tuple[Span, ...]:
    """Where the text holds data."""
    return text._spans if isinstance(text, Traced) else ()


def said_of(text: str) -> tuple[Span, ...]:
    """Where `{% generation %}` blocks stand."""
    return text._said if isinstance(text, Traced) else ()


def trace(value: Any, source: int) -> Any:
    """A value of JSON whose strings, names of fields too, are data of one source."""
    if isinstance(value, str):
        return Traced(value, [(0, len(value), source)])
    if isinstance(value, dict):
        return {trace(name, source): trace(part, source) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [trace(part, source) for part in value]
    return value


def sources(value: Any) -> set[int]:
    """The sources of the data in a value that is about to become text.

    Raises jinja2's SecurityError for what is no value of JSON: a function's text is an address.
    """
    if isinstance(value, Traced):
        return {source for _, _, source in value._spans}
    if value is None or isinstance(value, str | int | float | range | Undefined):
        return set()
    if isinstance(value, dict):
        return {source for pair in value.items() for part in pair for source in sources(part)}
    if isinstance(value, _LISTS):
        return {source for part in value for source in sources(part)}
    kind = type(value).__name__
    raise jinja2.exceptions.SecurityError(f"found a {kind} to print, expected a text or a number")


def _data(text: str, found: set[int]) -> str:
    """A text that was made from data of these sources, if there is any: data throughout."""
    if not found:
        return text
    return Traced(text, [(0, len(text), found.pop() if len(found) == 1 else OTHER)])


def printed(value: Any) -> Any:
    """What `{{ value }}` prints: texts as they are, all else as Python writes it."""
    if isinstance(value, str):
        return value
    return _data(str(value), sources(value))


def _followed(found: Any, given: Sequence[Any]) -> Any:
    """A text that something not followed made from what was given: data if there was any in it."""
    if not isinstance(found, str) or isinstance(found, Traced):
        return found
    return _data(found, sources(given))


def _watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that keeps track of data and turns no object of Python into text."""

    @functools.wraps(call)
    def run(*args: Any, **named: Any) -> Any:
        found = call(*args, **named)
        if name in _SELECTING:  # they hand on what they were given
            return found
        inner = (jinja2.Environment, Context, EvalContext)
        given = [value for value in (*args, *named.values()) if not isinstance(value, inner)]
        return _followed(found, given)

    return run


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is None:
        return joined(value, d)
    return joined([_attribute(part, attribute) for part in value], d)


def _attribute(value: Any, path: str | int) -> Any:
    for name in path.split(".") if isinstance(path, str) else [path]:
        value = value[int(name) if isinstance(value, list) else name]
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML. Layout alone may be chosen: json.dumps takes functions
    and classes, too, and would call them."""
    text = json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent
        if indent is None
        else min(indent, 16)
        if type(indent) is int
        else str(indent),
        separators=separators,
        sort_keys=bool(sort_keys),
    )
    return _data(text, sources(value))


class _Fields(SandboxedFormatter):
    """`str.format` of the sandbox, that prints values only."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        sources(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        sources(value)
        return str(super().format_field(value, format_spec))


class _Compiler(CodeGenerator):
    """Compiles `a ~ b` so that it is followed, too."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the assistant says its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's base class declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return said(caller())


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox as chat templates of Hugging Face expect it, following the data."""

    code_generator_class = _Compiler
    concat = staticmethod(joined)
    intercepted_binops = frozenset(["%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=printed,
        )
        for name in _NEEDLESS:
            self.globals.pop(name, None)
        self.filters = {name: _watched(name, call) for name, call in self.filters.items()}
        self.filters |= {"join": _join, "tojson": _tojson}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        bytes_of_text = isinstance(obj, str) and attr == "encode"  # they would forget what they are
        return not bytes_of_text and super().is_safe_attribute(obj, attr, value)

    def call(  # the names are Jinja's: a keyword argument of a template must not meet one
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ == "join" and len(args) == 1 and not kwargs:
            return joined(args[0], owner)
        found = super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, Macro | LoopContext | BlockReference):  # followed inside
            return found
        return _followed(found, [*args, *kwargs.values()])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return _followed(super().call_binop(context, operator, left, right), [left, right])

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, mapped = value.__self__, value.__name__ == "format_map"
        fields: Formatter = _Fields(self)

        def call(*args: Any, **kwargs: Any) -> str:
            if mapped:
                (kwargs,), args = args, ()
            return str(_followed(plain(fields.vformat(text, args, kwargs)), [text, args, kwargs]))

        return call
