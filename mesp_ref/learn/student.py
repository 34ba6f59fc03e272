"""A student's file: what is defined in it, and which of that answers an exercise."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.learn.exercise import Exercise


def load(path: str | Path) -> dict[str, Any]:
    """Run a Python file; what it defines, by name.

    Raises MespRefError for a file that is not there, and for what stops it, with its line
    """
    path = Path(path)
    if not path.is_file():
        raise MespRefError(f"{path}: found no such file, expected Python with your function")
    spec = importlib.util.spec_from_file_location(f"student_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise MespRefError(f"{path}: found another kind of file, expected one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # what lies beside it may be imported
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left beside it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise MespRefError(f"{path}: line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        where = f"line {lines[-1]}: " if lines else ""
        raise MespRefError(f"{path}: {where}{type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = before
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def answer_in(defined: dict[str, Any], exercise: Exercise) -> Callable[..., Any] | None:
    """The function that answers an exercise: of its name, of a shorter one, or of my_ before one."""
    for name in (exercise.name, *exercise.aliases):
        for spelled in (name, f"my_{name}"):
            if callable(defined.get(spelled)):
                found: Callable[..., Any] = defined[spelled]
                return found
    return None


def only_function(defined: dict[str, Any], path: str | Path) -> Callable[..., Any] | None:
    """The one function that a file itself defines; None where there are none, or several."""
    stem = f"student_{Path(path).stem}"
    own = [f for f in defined.values() if callable(f) and getattr(f, "__module__", "") == stem]
    return own[0] if len(own) == 1 else None
