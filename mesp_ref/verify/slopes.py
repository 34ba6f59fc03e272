"""Slopes of a function of one number by extrapolated differences, with an error that can be believed.

A table of differences over steps 1/4, 1/16, …, 4⁻¹⁶ of the scale: wide enough for functions that
live on a millionth of it and for those whose domain ends nearby. A step at which the function
raises or is not finite is left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LEVELS = 16
COLUMNS = 4
LEAST = 5  # levels before the search may end


class Slope(NamedTuple):
    """A derivative along a direction, how far off it may be, and Σ|dy·∂y| of its terms."""

    value: float
    error: float
    mag: float = 0.0

    @property
    def known(self) -> bool:
        """Is it a number, and worth at least three digits?"""
        return bool(np.isfinite(self.value)) and self.error <= 1e-3 * abs(self.value)


def _best(rows: list[list[float]], roundings: list[float]) -> tuple[float, float]:
    """The entry of the table that agrees best with the one before, the one after and the one beside.

    Three neighbours, because two can agree by accident where a function is noisy.
    """
    best, error = np.nan, np.inf
    for k, row in enumerate(rows):
        for c, value in enumerate(row):
            near = [row[c - 1]] if c else []
            near += [rows[j][c] for j in (k - 1, k + 1) if 0 <= j < len(rows) and c < len(rows[j])]
            if len(near) < 2:
                continue
            estimate = max(abs(value - other) for other in near) + roundings[k]
            if estimate < error:
                best, error = value, estimate
    return best, error


def extrapolated(
    difference: Callable[[float], float], base: int, scale: float, rounding: float
) -> tuple[float, float]:
    """Richardson's table over h = scale/4, scale/16, …; each column removes a power of h.

    base      what the error of a difference shrinks by at a step: 16 for central differences (h²),
              4 for one-sided ones (h)
    rounding  of the function's value: it errs a difference by rounding/h
    Source    Richardson 1911; the choice of the entry after Ridders 1982
    """
    rows: list[list[float]] = []
    steps: list[float] = []
    for level in range(1, LEVELS + 1):
        h = scale / 4.0**level
        first = difference(h)
        if not np.isfinite(first):
            rows, steps = [], []  # what was seen on the far side of a gap tells nothing here
            continue
        if first == 0 and rows and rows[-1][0] != 0:
            # The value comes in steps, and this h no longer reaches the next one: so large they are.
            rounding = max(rounding, abs(rows[-1][0]) * steps[-1])
            break
        row = [first]
        for c in range(1, COLUMNS if rows else 1):
            if c > len(rows[-1]):
                break
            row.append(row[-1] + (row[-1] - rows[-1][c - 1]) / (base**c - 1.0))
        rows.append(row)
        steps.append(h)
        if len(rows) >= LEAST:
            if not any(row[0] for row in rows):
                return 0.0, 0.0  # it does not move at all
            best, error = _best(rows, [2 * rounding / step for step in steps])
            if error <= 2e-12 * abs(best):
                return best, error
    return _best(rows, [2 * rounding / step for step in steps])


def diverges(difference: Callable[[float], float], scale: float) -> bool:
    """Does the difference quotient grow without end as the step shrinks?"""
    sizes = [abs(difference(scale / 4.0**level)) for level in range(4, LEVELS - 2, 2)]
    return all(not a < np.inf or b > 1.05 * a for a, b in zip(sizes, sizes[1:], strict=False))
