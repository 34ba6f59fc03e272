"""What the questions of the notebooks have in common: a formula, asked for as a function."""

from collections.abc import Callable, Mapping
from typing import Any

from mesp_ref.learn.exercise import Case, Exercise, Formula, Given, named_outputs


def question(
    function: Callable[..., Any],
    title: str,
    *,
    outputs: str = "answer",
    cases: tuple[Case, ...],
    formula: Formula,
    mistakes: Mapping[str, str],
    hints: tuple[str, str],
    **more: Any,
) -> Exercise:
    """A row whose statement, name and answer are those of one function's docstring."""
    row = {
        "name": function.__name__, "title": title, "function": function, "about": (function,),
        "named": named_outputs(tuple(outputs.split())), "cases": cases, "formula": formula,
        "mistakes": mistakes, "hints": hints, "numbers": sizes_of,
    }  # fmt: skip
    return Exercise(**{**row, **more})


def sizes(name: str, note: str, **given: Any) -> Case:
    """A case whose arguments are plain numbers."""
    return Case(name, note, lambda rng: dict(given))


def sizes_of(g: Given) -> Mapping[str, float]:
    """Every number among the arguments, which a wrong factor may be made of."""
    return {name: value for name, value in g.items() if isinstance(value, int | float)}
