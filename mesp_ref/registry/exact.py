"""What equations are written in: arrays of exact numbers, at the digits that are in force.

Numbers are mpmath's, or those of another `Arithmetic` within `using`: ball arithmetic encloses what an
equation gives (see verify.balls). mpmath is imported at the first use, so that the registry can be read
without it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import Array


class Arithmetic(NamedTuple):
    """Functions of numbers other than mpmath's; `number` makes one from an int."""

    number: Callable[[int], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    pi: Callable[[], Any]


_USED: ContextVar[Arithmetic | None] = ContextVar("arithmetic of equations", default=None)


@contextmanager
def using(arithmetic: Arithmetic) -> Iterator[None]:
    """Equations within compute in another arithmetic than mpmath's."""
    token = _USED.set(arithmetic)
    try:
        yield
    finally:
        _USED.reset(token)


def array(shape: tuple[int, ...], entry: Callable[..., Any]) -> Array:
    """An array of the numbers entry(*index)."""
    y = np.empty(shape, object)
    for at in np.ndindex(*shape):
        y[at] = entry(*at)
    return y


def dot(a: Array, b: Array) -> Any:
    """Σ a·b"""
    if _USED.get():
        return total(x * y for x, y in zip(a, b, strict=True))
    import mpmath

    return mpmath.fdot(list(a), list(b))


def total(values: Iterable[Any]) -> Any:
    """The sum of numbers."""
    if _USED.get():
        return sum(values, zero())
    import mpmath

    return mpmath.fsum(values)


def exp(x: Any) -> Any:
    """eˣ of a number."""
    if used := _USED.get():
        return used.exp(x)
    import mpmath

    return mpmath.exp(x)


def log(x: Any) -> Any:
    """The natural logarithm of a number."""
    if used := _USED.get():
        return used.log(x)
    import mpmath

    return mpmath.log(x)


def sqrt(x: Any) -> Any:
    """The square root of a number, of an int too."""
    if used := _USED.get():
        return used.sqrt(x)
    import mpmath

    return mpmath.sqrt(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent of a number."""
    if used := _USED.get():
        return used.tanh(x)
    import mpmath

    return mpmath.tanh(x)


def pi() -> Any:
    """π, to the digits in force."""
    if used := _USED.get():
        return used.pi()
    import mpmath

    return mpmath.mp.pi


def zero() -> Any:
    """The number 0."""
    if used := _USED.get():
        return used.number(0)
    import mpmath

    return mpmath.mpf(0)
