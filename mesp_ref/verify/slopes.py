"""Slopes of a function of one number by extrapolated differences, with an error that can be believed.

A table of differences over steps r⁻¹, r⁻², …, r⁻¹⁶ of the scale, r = 3.7: wide enough for functions that
live on a millionth of it and for those whose domain ends nearby. A step at which the function
raises or is not finite is left out.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RATIO = (
    3.7  # of two steps; no power of two, or the steps of a rounded function would line up with it
)
LEVELS = 16
COLUMNS = 4
LEAST = 5  # levels before the search may end
STEPPED = 2.0**-17  # of the largest move: a function moves in such steps at most, if rounded
CLOSE = 14  # the level asked besides, before it ends early


class Slope(NamedTuple):
    """A derivative along a direction, how far off it may be, and Σ|dy·∂y| of its terms."""

    value: float
    error: float
    mag: float = 0.0

    @property
    def known(self) -> bool:
        """Is it a number, and worth at least three digits?"""
        return bool(np.isfinite(self.value)) and self.error <= 1e-3 * abs(self.value)

    @property
    def is_finite(self) -> bool:
        """Does it settle, be it at 0? Measured by mag where the value is nothing."""
        return bool(np.isfinite(self.value)) and self.error <= 1e-3 * max(abs(self.value), self.mag)


def _best(rows: list[list[float]], roundings: list[float]) -> tuple[float, float]:
    """The entry of the table that agrees best with the one before, the one after and the one beside.

    Three neighbours, because two can agree by accident where a function is noisy. Where a coarser
    step gave two digits of another value, as it does for a function that moves in tiny steps, their
    distance is the error.
    """
    found: list[tuple[float, float]] = []
    for k, row in enumerate(rows):
        for c, value in enumerate(row):
            near = [row[c - 1]] if c else []
            near += [rows[j][c] for j in (k - 1, k + 1) if 0 <= j < len(rows) and c < len(rows[j])]
            if len(near) >= 2:
                found.append((max(abs(value - other) for other in near) + roundings[k], value))
    if not rows:
        return np.nan, np.inf
    if not found:  # too few to compare: known in size only
        return rows[-1][0], max(abs(row[0]) for row in rows) + min(roundings)
    error, best = _finest(found)
    for estimate, value in found[: found.index((error, best))]:
        if estimate <= 1e-2 * abs(value) and abs(value - best) > 10 * (estimate + error):
            error = max(error, abs(value - best))
    return best, error


def _finest(found: list[tuple[float, float]]) -> tuple[float, float]:
    """The surest entry; a finer one with two digits of another value is nearer to the limit."""
    error, best = min(found)
    for estimate, value in found[found.index((error, best)) :]:
        near = 1e-2 * max(abs(value), abs(best))
        if estimate <= near and abs(value - best) > 10 * (estimate + error):
            error, best = estimate, value
    return error, best


def _same_close(
    difference: Callable[[float], float], best: float, scale: float, rounding: Callable[[], float]
) -> bool:
    """Is the slope the same on a scale that no step has seen yet? A kink close by, and it is not."""
    h = scale / RATIO**CLOSE
    there = difference(h)
    same = abs(there - best) <= 1e-3 * abs(best) + 16 * rounding() / h
    return same or not np.isfinite(there)


def extrapolated(
    difference: Callable[[float], float],
    order: int,
    scale: float,
    rounding: Callable[[], float],
) -> tuple[float, float]:
    """Richardson's table over h = scale/r, scale/r², …; each column removes a power of h.

    order     of the error of a difference: 2 for central ones (h²), 1 for one-sided ones
    rounding  of what the differences so far were taken of: it errs one by rounding/h
    Source    Richardson 1911; the choice of the entry after Ridders 1982
    """
    rows: list[list[float]] = []
    steps: list[float] = []
    coarse, close, largest = 0.0, False, 0.0
    for level in range(1, LEVELS + 1):
        h = scale / RATIO**level
        first = difference(h)
        largest = max(largest, abs(first) * h) if np.isfinite(first) else largest
        if not np.isfinite(first):
            rows, steps = [], []  # what was seen on the far side of a gap tells nothing here
            continue
        if first == 0 and rows and rows[-1][0] != 0:
            # The value comes in steps, and this h no longer reaches the next one: so large they are.
            coarse = abs(rows[-1][0]) * steps[-1]
            if coarse <= max(STEPPED * largest, 64 * rounding()):
                break
            rows, steps, coarse = [], [], 0.0  # too large for rounding: a flat piece begins here
        row = [first]
        for c in range(1, COLUMNS if rows else 1):
            if c > len(rows[-1]):
                break
            row.append(row[-1] + (row[-1] - rows[-1][c - 1]) / (RATIO ** (order * c) - 1.0))
        rows.append(row)
        steps.append(h)
        if len(rows) >= LEAST:
            if not any(row[0] for row in rows):
                return 0.0, 0.0  # it does not move at all
            best, error = _best(rows, [rounding() / step for step in steps])
            if error <= 2e-12 * abs(best) and (
                close or _same_close(difference, best, scale, rounding)
            ):
                return best, error
            close = close or error <= 2e-12 * abs(best)
    return _best(rows, [max(rounding(), 2 * coarse) / step for step in steps])


def diverges(difference: Callable[[float], float], scale: float) -> bool:
    """Does the difference quotient grow as a power of the step, without end, as at sqrt(0)?

    By at least a twentieth at every step, and by less than rounding does.
    """
    sizes = [abs(difference(scale / RATIO**level)) for level in range(6, LEVELS + 8)]
    ratios = [b / a if a else 0.0 for a, b in itertools.pairwise(sizes)]
    return all(1.05 < ratio < 0.97 * RATIO for ratio in ratios)
