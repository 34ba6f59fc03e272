"""Where an answer differs from the truth: shape and dtype, values that are no numbers, entries."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mesp_ref.learn.exercise import Case, Exercise, Given, Outputs
from mesp_ref.ops import Array

DOUBLE, SINGLE = 1e-9, 1e-4  # of the size of the terms: far above rounding, far below any mistake
FLOOR = (
    1e-2  # of the largest term, for entries that are tiny: another right formula rounds there anew
)


class Seen(NamedTuple):
    """One case: what was given, what came, what should have come."""

    case: Case
    given: Given
    got: Outputs
    want: Outputs
    mag: Outputs  # how large the terms are that each output is summed from

    def error(self, name: str) -> Array:
        """|got − want| over the size of the terms; infinite where got is no number."""
        got, want, mag = (np.asarray(a) for a in (self.got[name], self.want[name], self.mag[name]))
        floor = FLOOR * mag.max(initial=0) + 1e-300
        error: Array = np.abs(got.astype(np.float64) - want) / (mag + floor)
        return np.where(np.isfinite(error), error, np.inf)


def seen(exercise: Exercise, case: Case, got: Outputs) -> Seen:
    args = exercise.draw(case)
    want = exercise.truth(case)
    if exercise.magnitudes is not None:
        with np.errstate(all="ignore"):
            mag = exercise.magnitudes(args, want)
    else:
        given = {n: w for n, w in want.items() if w is not None}
        mag = {n: np.full(np.shape(w), np.abs(w).max(initial=0)) for n, w in given.items()}
    return Seen(case, exercise.pool(case), got, want, mag)


def misfit(seen: Seen, name: str) -> str:
    """What is wrong with a result before its values count; "" when nothing is."""
    got, want = seen.got.get(name), seen.want[name]
    if got is None and want is None:
        return ""
    if got is None:
        return f"{name} is None, expected an array of shape {list(want.shape)}"
    if want is None:
        return f"{name} must be None in the case “{seen.case.name}” ({seen.case.note})"
    if got.dtype.kind not in "fiu" and got.dtype.kind != "b":
        return f"{name} has dtype {got.dtype}, expected real numbers"
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}, expected {list(want.shape)}"
    return ""


def wrong_names(every: Sequence[Seen], tolerance: float) -> list[str]:
    """The outputs that are wrong in some case."""
    names = list(every[0].want)
    assert all(list(s.want) == names for s in every), "every case has the same outputs"
    return [n for n in names if any(_is_wrong(s, n, tolerance) for s in every)]


def _is_wrong(seen: Seen, name: str, tolerance: float) -> bool:
    if misfit(seen, name):
        return True
    return seen.want[name] is not None and bool((seen.error(name) > tolerance).any())


def not_finite(every: Sequence[Seen], names: Sequence[str]) -> str:
    """The first value that is no number, in words."""
    for seen in every:
        for name in names:
            got = seen.got[name]
            if got is not None and got.dtype.kind == "f" and not np.isfinite(got).all():
                at = tuple(int(i) for i in np.argwhere(~np.isfinite(got))[0])
                return (
                    f"{name}{list(at) or ''} is {got[at]} in the case “{seen.case.name}” "
                    f"({seen.case.note})."
                )
    return ""


def first_wrong(every: Sequence[Seen], name: str, tolerance: float) -> str:
    """Where an output first differs, with got and expected."""
    for seen in every:
        if seen.want[name] is None or not (wrong := seen.error(name) > tolerance).any():
            continue
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f" in {int(wrong.sum())} of {wrong.size} entries; first {name}{list(at)}"
        return (
            f"{name} is wrong{where if at else ''}: "
            f"got {seen.got[name][at]:.6g}, expected {seen.want[name][at]:.6g} "
            f"(case “{seen.case.name}”: {seen.case.note})."
        )
    return ""


def same(got: Array | None, predicted: Array | None, mag: Array | None, near: float) -> bool:
    """Whether two results are the same up to `near` of their size; what is no number included."""
    if got is None or predicted is None:
        return got is None and predicted is None
    predicted = np.asarray(predicted)
    if got.shape != predicted.shape or got.dtype.kind not in "fiu":
        return False
    a, b = got.astype(np.float64), predicted.astype(np.float64)
    finite = np.isfinite(b)
    if (np.isfinite(a) != finite).any():
        return False
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    size = max(
        float(np.abs(b).max(initial=0)), 0.0 if mag is None else float(np.max(mag, initial=0))
    )
    return bool(np.abs(a - b).max(initial=0) <= near * size)
