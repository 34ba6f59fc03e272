"""What equations are written in: arrays of mpmath numbers, at the digits that are in force.

mpmath is imported at the first use, so that the registry can be read without it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mesp_ref.ops import Array


def array(shape: tuple[int, ...], entry: Callable[..., Any]) -> Array:
    """An array of the numbers entry(*index)."""
    y = np.empty(shape, object)
    for at in np.ndindex(*shape):
        y[at] = entry(*at)
    return y


def dot(a: Array, b: Array) -> Any:
    """Σ a·b"""
    import mpmath

    return mpmath.fdot(list(a), list(b))


def total(values: Iterable[Any]) -> Any:
    """The sum of numbers."""
    import mpmath

    return mpmath.fsum(values)


def exp(x: Any) -> Any:
    """eˣ of a number."""
    import mpmath

    return mpmath.exp(x)


def log(x: Any) -> Any:
    """The natural logarithm of a number."""
    import mpmath

    return mpmath.log(x)


def sqrt(x: Any) -> Any:
    """The square root of a number, of an int too."""
    import mpmath

    return mpmath.sqrt(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent of a number."""
    import mpmath

    return mpmath.tanh(x)


def pi() -> Any:
    """π, to the digits in force."""
    import mpmath

    return mpmath.mp.pi


def zero() -> Any:
    """The number 0."""
    import mpmath

    return mpmath.mpf(0)
