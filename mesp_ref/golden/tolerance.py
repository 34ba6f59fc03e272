"""How far a right backend may be from the truth: derived, per element, never tuned to pass.

An op case     |got − want| ≤ (s·u_store + 4·√k·u_acc)·mag + s·η
A free-running model   |got − want| ≤ gate: four times the worst error of our own emulation of the
               precision, one number per tensor, shipped in the manifest

s counts the roundings to storage on the way to the tensor when every intermediate is stored, k is
the longest sum, mag the expression on absolute values (all three are shipped). A 16-bit backend
sums in float32. η is what a storage rounding loses near zero: in float16 half of the smallest
subnormal; in float32 and bfloat16 the smallest normal number, because XLA and most GPUs flush what is
smaller to 0.
"""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops import Array


class Unit(NamedTuple):
    """What one rounding can do: relative to storage, relative in a sum, absolute near zero."""

    store: float
    sum: float
    eta: float


UNITS: dict[str, Unit] = {
    "float64": Unit(2.0**-53, 2.0**-53, 0.0),
    "float32": Unit(2.0**-24, 2.0**-24, 2.0**-126),
    "float16": Unit(2.0**-11, 2.0**-24, 2.0**-25),
    "bfloat16": Unit(2.0**-8, 2.0**-24, 2.0**-126),
}


def bound(mag: Array, k: int, s: int, dtype: str) -> Array:
    """The tolerance of an op's tensor, element by element, in float64."""
    unit = UNITS[dtype]
    return (s * unit.store + 4 * np.sqrt(k) * unit.sum) * mag.astype(np.float64) + s * unit.eta
