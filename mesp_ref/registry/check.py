"""Is a row whole? Every field is held against the functions it describes when it is registered."""

import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.registry.cases import ALL
from mesp_ref.registry.row import UNSAID, Function, OpSpec, parameters, unset
from mesp_ref.registry.sizes import Sizes

# How a pass is run, not what it computes: what to drop or keep, and into how many parts it is cut.
RUN = frozenset({"drop", "keep", "parts", "each"})

Fault = tuple[str, object, object]  # field, found, expected


def check(row: OpSpec) -> None:
    """Raise MespRefError with row, field, found and expected for the first thing that is not whole."""
    for find in (_pairs, _arguments, _equation, _backwards, _residuals, _sample, _golden):
        for field, found, expected in find(row):
            raise MespRefError(
                f"registry row {row.name!r}: {field}: found {_text(found)}, expected "
                f"{_text(expected)}"
            )


def _text(value: object) -> str:
    """Names in one line."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    return ", ".join(map(str, value)) or "nothing"


def _function(value: object) -> str:
    return "nothing" if value is unset else "a function" if callable(value) else repr(value)


def _pairs(row: OpSpec) -> Iterator[Fault]:
    """Functions where functions belong; a backward, and its magnitude, for every kind of argument."""
    for name in ("forward", "sample", "reduction_length", "equation"):
        yield from _must_be(row, name, True)
    wanted = bool(row.activations or row.lora), bool(row.parameters)
    for name, there in zip(("backward", "backward_params"), wanted, strict=True):
        yield from _must_be(row, name, there)
        yield from _must_be(row, name.replace("backward", "magnitude"), there)
    if not any(wanted):
        yield "activations, lora, parameters", "nothing", "an argument that has a gradient"


def _must_be(holder: Any, name: str, there: bool) -> Iterator[Fault]:
    value = getattr(holder, name)
    if (callable(value) and value is not unset) != there:
        yield name, _function(value), "a function" if there else "None: no argument is its own"


def _arguments(row: OpSpec) -> Iterator[Fault]:
    """The five kinds are the forward's arguments, each once."""
    names, anything = parameters(row.forward)
    twice = sorted({name for name in row.arguments if row.arguments.count(name) > 1})
    if twice:
        yield "arguments", f"{_text(twice)} twice", "each in one kind"
    known = [name for name in names if name not in RUN]
    unnamed = [name for name in known if name not in row.arguments]
    foreign = [name for name in row.arguments if name not in known]
    if unnamed or (foreign and not anything):
        yield "arguments", sorted(row.arguments), f"those of the forward: {_text(sorted(known))}"
    yield from _within(row, "optional", row.optional, row.arguments)


def _within(
    row: OpSpec, field: str, found: Iterable[str], allowed: Iterable[str]
) -> Iterator[Fault]:
    foreign = [name for name in found if name not in set(allowed)]
    if foreign:
        yield field, foreign, f"names among {_text(allowed)}"


def _equation(row: OpSpec) -> Iterator[Fault]:
    """The equation takes arguments of the op, and all but attributes (tiles are none of its)."""
    names, anything = parameters(row.equation)
    needed = row.differentiable + row.constants
    if not anything:
        yield from _within(row, "equation", names, row.arguments)
        missing = [name for name in needed if name not in names]
        if missing:
            yield "equation", f"no argument {_text(missing)}", f"all of {_text(needed)}"


def _backwards(row: OpSpec) -> Iterator[Fault]:
    """Backwards and magnitudes take a cotangent, residuals, and then arguments of the op."""
    for field in ("backward", "backward_params", "magnitude", "magnitude_params"):
        function: Function | None = getattr(row, field)
        if function is not None:
            first, _ = parameters(function)
            if len(first) < 2:
                yield field, f"arguments {_text(first)}", "a cotangent and the residuals first"
            again = [name for name in parameters(function, 2).names if name not in RUN]
            yield from _within(row, field, again, row.arguments)


def _residuals(row: OpSpec) -> Iterator[Fault]:
    """What can be dropped is a residual, and the forward can be told to."""
    if row.droppable and "drop" not in parameters(row.forward).names:
        yield "droppable", row.droppable, "nothing: the forward has no argument drop"
    fields = _fields(row.forward)
    if fields is not None:
        yield from _within(row, "droppable", row.droppable, fields)


def _fields(forward: Function) -> tuple[str, ...] | None:
    """The fields of the residuals that the forward says it returns; None when it does not say."""
    said = typing.get_args(inspect.signature(forward).return_annotation)
    fields = getattr(said[1], "__annotations__", None) if len(said) == 2 else None
    return None if fields is None else tuple(fields)


def _sample(row: OpSpec) -> Iterator[Fault]:
    """A sample has every argument; attributes may stay at their defaults."""
    args = row.sample(np.random.default_rng(0), Sizes(), np.float64)
    yield from _within(row, "sample", args, row.arguments)
    missing = [name for name in row.differentiable + row.constants if name not in args]
    if missing:
        yield "sample", sorted(args), f"{_text(missing)}, too"


def _golden(row: OpSpec) -> Iterator[Fault]:
    """Roundings of every tensor, cases with names of their own, and two twins."""
    golden = row.golden
    if golden is None:
        return
    if golden is UNSAID:
        yield "golden", "nothing", "a Golden; None where the op only sums in another order"
        return
    for name in ("forward_length", "output_magnitude", "torch", "functional"):
        yield from ((f"golden.{f}", found, wanted) for f, found, wanted in
                    _must_be(golden, name, True))  # fmt: skip
    tensors = {"y", *(f"d{name}" for name in row.differentiable)}
    if set(golden.roundings) != tensors:
        yield "golden.roundings", sorted(golden.roundings), sorted(tensors)
    names = [case.name for case in golden.cases]
    if not names or len(set(names)) < len(names):
        yield "golden.cases", names, "at least one case, and no name twice"
    for case in golden.cases:
        yield from _within(row, f"golden.cases: {case.name}", case.dtypes, ALL)
    needed = row.differentiable + row.constants
    for field in ("output_magnitude", "torch", "functional"):
        yield from _takes(f"golden.{field}", getattr(golden, field), needed)


def _takes(field: str, function: Function, needed: tuple[str, ...]) -> Iterator[Fault]:
    names, anything = parameters(function)
    missing = [name for name in needed if name not in names]
    if missing and not anything:
        yield field, f"no argument {_text(missing)}", f"all of {_text(needed)}"
