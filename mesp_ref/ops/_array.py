"""What every op shares: arrays and weights, rows of a stack, and a sigmoid that is safe everywhere."""

from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

NOTHING: frozenset[str] = frozenset()


class Table(Protocol):
    """A weight as ops see it: an array, or whatever answers an index with one of the compute dtype.

    `w[...]` is the whole, `w[a:b]` some rows, `w[:, a:b]` some columns, `w[ids]` chosen rows. An op
    asks for no more than it needs and keeps nothing, so a decoded weight dies inside the op.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Any, /) -> Array: ...


def rows(x: Array) -> Array:
    """The vectors along the last axis as one matrix, so that a stack is one GEMM.

    Shapes    x [..., C] -> [M, C] with M the product of the leading axes; a view where possible
    """
    return x.reshape(-1, x.shape[-1])


def sigmoid(x: Array) -> Array:
    """Logistic function without overflow and without losing its small values.

    Forward   σ = a/(a + b) with a = exp(min(x, 0)), b = exp(−max(x, 0)): 1/(1+e⁻ˣ) where x ≥ 0 and
              eˣ/(1+eˣ) elsewhere, because one of the two exponentials is exp(0) = 1
    Shapes    x [...] -> [...], real or complex; NumPy's minimum looks at the real part first, so
              the function stays analytic and a complex step passes through it
    Why       1/(1+exp(−x)) is NaN at complex −800, and 0.5·(1+tanh(x/2)) is 0 at −40
    """
    a = np.minimum(x, 0)
    b = a - x  # −max(x, 0)
    np.exp(a, out=a)
    np.exp(b, out=b)
    b += a
    a /= b
    return a


def sigmoids(x: Array, plus: Array, minus: Array, total: Array) -> None:
    """plus = σ(x) and minus = σ(−x) from the two exponentials of `sigmoid`: a/(a + b), b/(a + b)."""
    np.minimum(x, 0, out=plus)
    np.subtract(plus, x, out=minus)
    np.exp(plus, out=plus)
    np.exp(minus, out=minus)
    np.add(plus, minus, out=total)
    plus /= total
    minus /= total
