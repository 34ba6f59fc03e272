"""What an exercise says: equation, shapes and what is given, read from the op's own docstrings."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from mesp_ref.learn.exercise import Exercise

_LABEL = re.compile(r"^    ([A-Z][a-z]+)  +(.*)$")
SHOWN = ("Asked", "Forward", "Shapes", "Estimate", "Step", "Source")


class Statement:
    """Prints itself."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def show(name: str) -> Statement:
    """An exercise: its equation, the shapes, what is given and what is asked for.

    Raises MespRefError for an exercise that there is not
    """
    from mesp_ref.learn.exercises import find

    exercise = find(name)
    lines = [f"{exercise.name}: {exercise.title}", ""]
    for function in exercise.about:
        labels = sections(function)
        for label in SHOWN:
            head, *rest = labels.get(label, [""])
            lines += [f"  {label:10s}{head}", *(f"{'':12s}{text}" for text in rest)] if head else []
    lines += ["", "Write", f"  def {exercise.name}{_signature(exercise.function)}", ""]
    lines += _given(exercise)
    lines += ["Tried with", *(f"  {case.name:15s}{case.note}" for case in exercise.cases)]
    lines += ["", f'Then: learn.check("{exercise.name}", your_function)']
    return Statement("\n".join(lines))


def sections(function: Callable[..., Any]) -> dict[str, list[str]]:
    """The labelled lines of a docstring, those that go on joined to their label."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in (function.__doc__ or "").splitlines():
        if match := _LABEL.match(line):
            current = found.setdefault(match[1], [])
            current.append(match[2])
        elif current is not None and line.startswith(" " * 12):
            current.append(line.strip())
        else:
            current = None
    return found


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _given(exercise: Exercise) -> list[str]:
    """What is given: the residuals with the comments of their fields, then the exercise's own words."""
    lines = []
    args = exercise.draw(exercise.cases[0])
    res = args.get("res")
    if hasattr(res, "_fields"):
        source = inspect.getsource(type(res))
        fields = [line.strip() for line in source.splitlines() if re.match(r"    \w+: ", line)]
        if fields:
            lines += ["Given in res", *(f"  {_field(line)}" for line in fields), ""]
    if exercise.given:
        lines += ["Given", *(f"  {line}" for line in exercise.given.splitlines()), ""]
    return lines


def _field(line: str) -> str:
    """ "x: Array | None  # [..., C]; None once dropped" as "x   [..., C]"."""
    name, _, rest = line.partition(":")
    comment = rest.partition("#")[2].strip()
    return f"{name:8s}{re.split('; None', comment)[0]}"


def hints(exercise: Exercise, level: int) -> list[str]:
    """The hints up to a level."""
    lines = [f"Hint {i + 1}: {text}" for i, text in enumerate(exercise.hints[:level])]
    if level >= 3:
        found = [t for f in exercise.about for t in _backward(f)]
        lines += [f"Hint 3: {' '.join(found)}"] if found else []
    return lines


def _backward(function: Callable[..., Any]) -> list[str]:
    labels = sections(function)
    return next((labels[l] for l in ("Answer", "Backward", "Estimate", "Step") if l in labels), [])
