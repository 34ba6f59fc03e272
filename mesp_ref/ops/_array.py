"""What every op shares: the array type, rows of a stack, and a sigmoid that is safe everywhere."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

NOTHING: frozenset[str] = frozenset()


def rows(x: Array) -> Array:
    """The vectors along the last axis as one matrix, so that a stack is one GEMM.

    Shapes    x [..., C] -> [M, C] with M the product of the leading axes; a view where possible
    """
    return x.reshape(-1, x.shape[-1])


def sigmoid(x: Array) -> Array:
    """Logistic function without overflow and without losing its small values.

    Forward   e = exp(−|x|);  σ = 1/(1+e) where x ≥ 0, e/(1+e) elsewhere
    Shapes    x [...] -> [...], real or complex; the branch looks at the real part only, so the
              function stays analytic and a complex step passes through it
    Why       1/(1+exp(−x)) is NaN at complex −800, and 0.5·(1+tanh(x/2)) is 0 at −40
    """
    positive = x.real >= 0
    e = np.exp(np.where(positive, -x, x))
    y = np.where(positive, 1, e).astype(x.dtype, copy=False)
    e += 1
    y /= e
    return y
