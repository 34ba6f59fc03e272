"""Put another function in the place of one of ours, everywhere, for a while."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

Function = Callable[..., Any]


def original(path: str) -> Any:
    """What "ops.rmsnorm:rmsnorm_bwd" or "engine.adapter:Adapter.scale" names, below mesp_ref; or, by
    the whole name of its module, a function of an op that was registered from outside.

    A function comes as a copy, which goes on computing what it does now whatever is planted; of one
    with a decorator it is the function below.
    """
    holder, name = _place(path)
    found = inspect.unwrap(vars(holder)[name])
    if not isinstance(found, FunctionType):
        return found
    copy = FunctionType(
        found.__code__, found.__globals__, found.__name__, found.__defaults__, found.__closure__
    )
    copy.__kwdefaults__ = found.__kwdefaults__
    return copy


def _place(path: str) -> tuple[Any, str]:
    """The module or class that holds a path's function, and its name there."""
    module, _, name = path.partition(":")
    holder: Any = sys.modules.get(module) or importlib.import_module(f"mesp_ref.{module}")
    *classes, name = name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    return holder, name


def _instead(*args: Any, _planted: Function, **options: Any) -> Any:
    return _planted(*args, **options)


@contextmanager
def _swapped(holder: Any, name: str, new: Any) -> Iterator[None]:
    """A method or property is replaced in its class; a function gets the body of the new one.

    The function itself stays the same object, so whoever refers to it, by an import, in a table, as
    a default or inside a partial, calls the new body.
    """
    old = vars(holder)[name]
    if isinstance(holder, type):
        setattr(holder, name, new)
        try:
            yield
        finally:
            setattr(holder, name, old)
        return
    old, new = inspect.unwrap(old), inspect.unwrap(new)  # what a decorator took, it calls again
    before = old.__code__, old.__defaults__, old.__kwdefaults__
    bare = isinstance(new, FunctionType) and new.__globals__ is old.__globals__
    if bare and not new.__code__.co_freevars:
        after = new.__code__, new.__defaults__, new.__kwdefaults__
    else:
        after = _instead.__code__, None, {"_planted": new}
        old.__signature__ = inspect.signature(new)
    old.__code__, old.__defaults__, old.__kwdefaults__ = after
    try:
        yield
    finally:
        old.__code__, old.__defaults__, old.__kwdefaults__ = before
        vars(old).pop("__signature__", None)


@contextmanager
def planted(changes: Mapping[str, Function]) -> Iterator[None]:
    """Replace functions by path wherever mesp_ref refers to them."""
    with ExitStack() as stack:
        for path, new in changes.items():
            stack.enter_context(_swapped(*_place(path), new))
        yield
