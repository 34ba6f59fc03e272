"""NaN and infinity are stopped where results leave: at loading, merging, converting, quantising."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array, Table

_PIECE = 1 << 20  # numbers looked at together


def is_finite(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity; integers never do."""
    if array.dtype.kind in "iub":
        return True
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + _PIECE]).all() for i in range(0, flat.size, _PIECE))


def cast_finite(array: Array, dtype: Any, where: str, advice: str) -> Array:
    """The array in another type, contiguous.

    Raises MespRefError, which begins with `where` and ends with `advice`, for NaN, infinity and
    numbers that are infinite in that type.
    """
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    if not is_finite(cast):
        raise MespRefError(
            f"{where}: found NaN or infinity in {cast.dtype.name}, expected finite numbers; {advice}"
        )
    return cast


def not_finite(weights: Mapping[str, Table]) -> str | None:
    """The first tensor of a model that holds NaN or infinity, looked at some rows at a time."""
    for name, table in weights.items():
        rows, *rest = table.shape
        step = max(1, _PIECE // max(1, int(np.prod(rest))))
        for row in range(0, rows, step):
            with np.errstate(over="ignore", invalid="ignore"):
                tile = table[row : row + step]
            if not is_finite(tile):
                return name
    return None
