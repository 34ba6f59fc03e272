"""Put another function in the place of one of ours, everywhere, for a while."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mesp_ref.registry import OPS

Function = Callable[..., Any]


def original(path: str) -> Any:
    """What "ops.rmsnorm:rmsnorm_bwd" or "engine.adapter:Adapter.scale" names, below mesp_ref; or, by
    the whole name of its module, a function of an op that was registered from outside."""
    holder, name = _place(path)
    return vars(holder)[name]


def _place(path: str) -> tuple[Any, str]:
    """The module or class that holds a path's function, and its name there."""
    module, _, name = path.partition(":")
    holder: Any = sys.modules.get(module) or importlib.import_module(f"mesp_ref.{module}")
    *classes, name = name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    return holder, name


def _holders() -> Iterator[dict[str, Any]]:
    """Every namespace that a function can be looked up in, and tables such as METHODS: those of
    mesp_ref, and of ops that were registered from outside.

    Not those of the seeded bugs, which may call the function whose place they take.
    """
    outside = {f.__module__ for row in OPS.values() for f in row.functions}
    for name, module in list(sys.modules.items()):
        ours = name.split(".")[0] == "mesp_ref" and not name.startswith("mesp_ref.verify.bugs")
        if ours or name in outside:
            yield vars(module)
            yield from (
                table for key, table in vars(module).items()
                if isinstance(table, dict) and not key.startswith("__")
            )  # fmt: skip


@contextmanager
def planted(changes: Mapping[str, Function]) -> Iterator[None]:
    """Replace functions by path wherever mesp_ref refers to them, the registry's rows included
    (what is checked of them: their yardsticks stay those of the right code).

    A function is found by identity, so that what other modules imported by name changes too;
    methods and properties are replaced in their class.
    """
    swaps = {id(original(path)): new for path, new in changes.items()}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    classes = [(*_place(path), original(path)) for path in changes if "." in path.partition(":")[2]]
    try:
        for holder, name, old in classes:
            setattr(holder, name, swaps[id(old)])
        for holder in _holders():
            for key, value in list(holder.items()):
                new = swaps.get(id(value), value)
                if holder is OPS:
                    held = {name: getattr(value, name) for name in value.CHECKED}
                    moved = {k: swaps[id(v)] for k, v in held.items() if id(v) in swaps}
                    new = replace(value, **moved) if moved else value
                if new is not value:
                    undo.append((holder, key, value))
                    holder[key] = new
        yield
    finally:
        for holder, key, value in reversed(undo):
            holder[key] = value
        for holder, name, old in classes:
            setattr(holder, name, old)
