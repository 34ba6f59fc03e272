"""Numbers that every precision holds: exact in bfloat16 and in float16 at once."""

import zlib
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array


def representable(x: Array) -> Array:
    """x rounded to 8 significant bits, and to multiples of 2⁻²⁴, as float64.

    Raises MespRefError for values beyond float16's largest
    """
    for _ in range(2):  # a second time, because the first may round up to another binade
        x = np.asarray(x, np.float64).astype(ml_dtypes.bfloat16).astype(np.float16)
    if not np.isfinite(x).all():
        raise MespRefError("a golden input exceeds float16's range")
    return x.astype(np.float64)


def generator(name: str) -> np.random.Generator:
    """The random numbers of a case: seeded by its name, so that cases do not depend on order."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def representable_args(args: dict[str, Any]) -> dict[str, Any]:
    """Every floating array of a case made representable."""
    return {
        name: representable(value)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in args.items()
    }


def stored(value: Array) -> Array:
    """As an input is shipped: float32 (exact for what is representable) or int32."""
    return value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
