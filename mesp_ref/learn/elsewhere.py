"""The mistakes that golden check knows, for the exercises about an op.

Nothing is typed twice: a mistake of the golden checker is computed on the inputs of the exercise, and
where it gives the student's values, its name there is told. It also knows some that no exercise does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes import known, title
from mesp_ref.golden.plain import Plain
from mesp_ref.golden.simulate import Run, of_op
from mesp_ref.learn.compare import Seen, same
from mesp_ref.learn.exercise import Exercise, Outputs

_CANNOT = (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError)


def golden_names(exercise: Exercise, every: Sequence[Seen], near: float) -> list[str]:
    """The names in golden check of what gives the student's results in every case."""
    if not exercise.op:
        return []
    runs, titles = [], []
    for seen in every:
        inputs, attributes = _split(exercise, seen)
        run = of_op(exercise.op, inputs, attributes)
        if run is None or not _gives(run, Plain, seen, seen.want, near):
            return []
        runs.append(run)
        titles.append({title(m): m for m in known("op", {"op": exercise.op} | attributes, inputs)})
    return [
        name
        for name in titles[0]
        if all(name in found for found in titles)
        and all(
            _gives(run, found[name], seen, seen.got, near)
            for run, found, seen in zip(runs, titles, every, strict=True)
        )
    ]


def _split(exercise: Exercise, seen: Seen) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and attributes of the op's forward, as golden cases have them."""
    args = exercise.forward(seen.case)
    args["dy"] = np.asarray(args["dy"])
    arrays = {name: value for name, value in args.items() if isinstance(value, np.ndarray)}
    attributes = {name: value for name, value in args.items() if isinstance(value, float)}
    return arrays, attributes


def _gives(run: Run, kind: type[Plain], seen: Seen, got: Outputs, near: float) -> bool:
    """Whether a golden mistake gives some results in a case."""
    try:
        with np.errstate(all="ignore"):
            found = run(kind)
    except _CANNOT:
        return False
    return all(same(got.get(n), found.get(n), seen.mag.get(n), near) for n in seen.want)
