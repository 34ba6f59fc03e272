"""Calling what a student wrote: its signature, its exceptions, the arrays of any framework."""

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mesp_ref.engine.half import Residuals
from mesp_ref.errors import shown
from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs
from mesp_ref.ops import Array

Function = Callable[..., Any]
Call = Callable[[Given], Any]


# What an exception of NumPy or Python most often comes from in a backward.
_ADVICE = (
    (
        r"could not be broadcast",
        "Two shapes do not fit: is keepdims=True missing, or an axis in another place?",
    ),
    (
        r"matmul|not aligned|core dimension",
        "Two matrices do not fit: is one of them to be transposed?",
    ),
    (r"-100 is out of bounds", "A label of −100 is no index: such rows do not count."),
    (
        r"NoneType",
        "What is None is not there in this case: a bias that a layer has not, or what was dropped.",
    ),
)


class Told(Exception):
    """Why there is nothing to compare, as a sentence."""


Way = Callable[[Given], tuple[list[Any], dict[str, Any]]]


def bound(exercise: Exercise, function: Any) -> Call:
    """The function as one of the exercise's arguments by name.

    A parameter is filled by its name, also by that of a field of `res`; where a function has names
    of its own it gets the arguments in the order of the exercise, `res` whole or field by field.
    Raises    Told for what cannot be called so
    """
    if not callable(function):
        found, expected = type(function).__name__, _plain(inspect.signature(exercise.function))
        raise Told(
            f"Found {found}, expected a function {exercise.name}{expected}: hand it over without "
            "calling it."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return lambda args: function(*args.values())
    args = exercise.pool(exercise.cases[0])
    by_name = _by_name(exercise, signature, args)
    ways = [by_name] if by_name else list(_in_order(exercise, signature, args))
    if not ways:
        expected = _plain(inspect.signature(exercise.function))
        raise Told(f"It takes {_plain(signature)}, expected {expected}.")
    return lambda args: _called(function, ways, args)


def _called(function: Function, ways: list[Way], args: Given) -> Any:
    """The function, called in the first way that it can be; the first exception where there is none."""
    first: Exception | None = None
    for way in ways:
        positional, options = way(args)
        try:
            return function(*positional, **options)
        except (TypeError, AttributeError) as error:
            first = first or error
    assert first is not None
    raise first


def _by_name(exercise: Exercise, signature: inspect.Signature, args: Given) -> Way | None:
    """The first argument by position, the others by name; None where a name is not known."""
    own = list(signature.parameters.values())
    if not own or own[0].kind not in (own[0].POSITIONAL_ONLY, own[0].POSITIONAL_OR_KEYWORD):
        return None
    first = own[0].name if own[0].name in args else exercise.parameters[0].name
    named = [p.name for p in own[1:] if p.name in args and p.kind is not p.POSITIONAL_ONLY]
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [p.name for p in own[1:] if p.default is p.empty and p.kind not in open_ended]
    if not set(needed) <= set(named) or not named:
        return None
    return lambda args: ([args[first]], {name: args[name] for name in named})


def _in_order(exercise: Exercise, signature: inspect.Signature, args: Given) -> Iterator[Way]:
    """The order of the exercise, options by name or behind the others, `res` whole or its fields."""
    fields = list(getattr(args.get("res"), "_fields", ()))
    whole = [p.name for p in exercise.parameters if p.kind is not p.KEYWORD_ONLY]
    options = [p.name for p in exercise.parameters if p.name not in whole]
    apart = [n for name in whole for n in (fields if name == "res" and fields else [name])]
    for order, rest in (
        (whole, options),
        (whole + options, []),
        (apart, options),
        (apart + options, []),
    ):
        way = _way(order, rest)
        positional, named = way(args)
        try:
            signature.bind(*positional, **named)
        except TypeError:
            continue
        yield way


def _way(order: list[str], rest: list[str]) -> Way:
    return lambda args: ([args[name] for name in order], {name: args[name] for name in rest})


def _plain(signature: inspect.Signature) -> str:
    """A signature without annotations."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def answer(exercise: Exercise, call: Call, case: Case, function: Any) -> tuple[Outputs, list[str]]:
    """What the function gives for a case, by output, as arrays; and which inputs it changed.

    Raises    Told for an exception of the student's code, and for results that are no arrays
    """
    given = exercise.pool(case)
    try:
        with np.errstate(all="ignore"):
            returned = _run(call, given)
    except Exception as error:
        raise Told(_exception(error, function, case)) from None
    before = dict(_arrays("", exercise.pool(case)))
    changed = [
        name for name, array in _arrays("", given)
        if name in before and not _unchanged(array, before[name])
    ]  # fmt: skip
    try:
        named = exercise.named(returned)
        return {name: _array(name, value) for name, value in named.items()}, changed
    except ValueError as error:
        raise Told(_sentence(str(error))) from None


def _unchanged(after: Array, before: Array) -> bool:
    """Up to the rounding of what was changed and put back."""
    if after.shape != before.shape or after.dtype.kind != "f":
        return np.array_equal(after, before)
    size = float(np.abs(before).max(initial=0))
    return bool(np.abs(after - before).max(initial=0) <= 1e-12 * size)


def _run(call: Call, given: Given) -> Any:
    """The call; once more with tensors where a function of torch does not take arrays."""
    try:
        return call(given)
    except (TypeError, AttributeError, ValueError):
        torch = sys.modules.get("torch")
        if torch is None:
            raise
        tensors = Given({name: _tensors(torch, value) for name, value in given.items()})
        try:
            return call(tensors)
        except Exception:
            pass
        raise


def _tensors(torch: Any, value: Any) -> Any:
    """Arrays as tensors, also those in the fields of a tuple."""
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_tensors(torch, field) for field in value))
    return value


def _array(name: str, value: Any) -> Array | None:
    """A result as an array: of NumPy, torch, JAX, or of nested lists. None stays.

    Raises    ValueError for what is none, in a student's words
    """
    if value is None or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        kind = type(value).__name__
        raise ValueError(f"{name} is a {kind} of which no array can be made") from None


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """Every array among arguments, under a name such as res.x."""
    if isinstance(value, np.ndarray):
        yield name, value
        return
    if isinstance(value, Residuals):
        items = list(vars(value).items())
    elif isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    else:
        items = list(vars(value).items()) if hasattr(value, "weights") else []
    for key, item in items:
        yield from _arrays(f"{name}.{key}" if name else key, item)


def _exception(error: Exception, function: Any, case: Case) -> str:
    """An exception of the student's code in one line, with the line that raised it."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = ""
    if frames:
        line = frames[-1].line
        where = f" in line {frames[-1].lineno}" + (f", `{line.strip()}`" if line else "")
    message = " ".join(str(error).split())
    advice = next((f" {text}" for pattern, text in _ADVICE if re.search(pattern, message)), "")
    return (
        f"It stopped with {type(error).__name__}{where}: {message or shown(error)} "
        f"(case “{case.name}”: {case.note}).{advice}"
    )


def _sentence(text: str) -> str:
    """A text with a capital letter and an end."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('?') else '.'}"
