"""Which functions a gradient passes through: watched while it is computed."""

import importlib
import inspect
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from mesp_ref import engine, lean, ops

# What looks at a step and computes nothing of it: checks of arguments, names and shapes.
_LOOK_ON = frozenset({"engine.inputs", "engine.init", "engine.config", "engine.generate"})


def path_of(function: Any) -> str:
    """Where a function stands: see planted.original."""
    return f"{_short(function.__module__)}:{function.__qualname__}"


def _short(module: str) -> str:
    return module.removeprefix("mesp_ref.")


def _modules() -> Iterator[ModuleType]:
    """All modules of ops, engine and lean that compute."""
    for package in (ops, engine, lean):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if _short(found.name) not in _LOOK_ON:
                yield importlib.import_module(found.name)


def functions(module: ModuleType) -> Iterator[FunctionType]:
    """Functions, methods and properties that a module itself writes down."""
    for value in vars(module).values():
        for found in vars(value).values() if inspect.isclass(value) else (value,):
            target = found.fget if isinstance(found, property) else found
            if (
                isinstance(target, FunctionType)
                and target.__module__ == module.__name__
                and inspect.unwrap(target).__code__.co_filename == module.__file__  # no dataclass's
            ):
                yield target


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of what is written inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _index(module: ModuleType) -> dict[CodeType, str]:
    return {
        code: path_of(function) for function in functions(module)
        for code in _codes(inspect.unwrap(function).__code__)
    }  # fmt: skip


@cache
def _ours() -> dict[CodeType, str]:
    """Code -> path of every function of ops, engine and lean that computes."""
    return {code: path for module in _modules() for code, path in _index(module).items()}


@contextmanager
def _profiled(look: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """A profile function in this thread and in those that are started meanwhile."""
    before = sys.getprofile()
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


def reached(run: Callable[[], object], *more: ModuleType) -> list[str]:
    """Paths of the functions of ops, engine, lean (and `more` modules) that a run calls, in order."""
    known = _ours() | {code: path for module in more for code, path in _index(module).items()}
    found: dict[str, None] = {}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in known:
            found[known[frame.f_code]] = None

    with _profiled(look):
        run()
    return list(found)
