"""The mistakes that golden check and the kill table know, for the exercises about an op.

Nothing is typed twice: a mistake of the golden checker is computed on the inputs of the exercise, and
where it gives the student's values, its name there is told. It also knows some that no exercise does.
A bug of the kill table is an edit of the op's own source, and is computed, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes import known, title
from mesp_ref.golden.plain import Plain
from mesp_ref.golden.simulate import Run, of_op
from mesp_ref.learn.compare import Seen, same
from mesp_ref.learn.exercise import Exercise, Outputs
from mesp_ref.verify.bugs import BUGS

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


def seeded_names(exercise: Exercise, every: Sequence[Seen], near: float) -> list[str]:
    """The bugs of the kill table, in the function to be written, that give the student's results."""
    if not exercise.op:
        return []
    target = exercise.about[-1]
    path = f"{target.__module__.removeprefix('mesp_ref.')}:{target.__name__}"
    bugs = [bug for bug in BUGS.values() if {edit[0] for edit in bug.edits} == {path}]
    return [
        bug.name
        for bug in bugs
        if all(_edited(exercise, bug.functions()[path], seen, near) for seen in every)
    ]


def _edited(exercise: Exercise, function: Callable[..., Any], seen: Seen, near: float) -> bool:
    """Whether an edited op gives the student's results in a case."""
    try:
        with np.errstate(all="ignore"):
            found = exercise.named(function(**exercise.draw(seen.case)))
    except (*_CANNOT, NameError):
        return False
    return all(same(seen.got.get(n), found.get(n), seen.mag.get(n), near) for n in seen.want)


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
