"""Values and derivatives of an equation, enclosed: ball arithmetic with power series.

A number is a power series c₀ + c₁·ε whose coefficients are balls (python-flint's `arb_series`): every
operation rounds outwards, so the true value and the true derivative lie in them. The derivative of an
equation with respect to an entry x is c₁ when that entry is x + ε: no gradient formula is used, and no
step that would have to be small.

Source    Johansson 2017, Arb: efficient arbitrary-precision midpoint-radius interval arithmetic
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array
from mesp_ref.registry.exact import Arithmetic, using

WIDTHS = (400, 800, 1600)  # bits, until every value is decided
BITS, WIDEST = WIDTHS[0], 2000


class Number:
    """A series that NumPy takes for a number: flint's own look like sequences to it."""

    __slots__ = ("series",)

    def __init__(self, series: Any):
        self.series = series

    def __add__(self, other: Any) -> "Number":
        return Number(self.series + _series(other))

    def __sub__(self, other: Any) -> "Number":
        return Number(self.series - _series(other))

    def __rsub__(self, other: Any) -> "Number":
        return Number(_series(other) - self.series)

    def __mul__(self, other: Any) -> "Number":
        return Number(self.series * _series(other))

    def __truediv__(self, other: Any) -> "Number":
        return Number(self.series / _series(other))

    def __rtruediv__(self, other: Any) -> "Number":
        return Number(_series(other) / self.series)

    def __neg__(self) -> "Number":
        return Number(-self.series)

    __radd__, __rmul__ = __add__, __mul__


def _series(value: Any) -> Any:
    if isinstance(value, Number):
        return value.series
    return _flint().arb_series([value], prec=2)


def _flint() -> Any:
    try:
        import flint
    except ModuleNotFoundError:
        raise MespRefError(
            "python-flint: not installed, needed to certify; pip install python-flint"
        ) from None
    return flint


def _of(value: Any) -> Number:
    return Number(_series(value))


ARITHMETIC = Arithmetic(
    number=_of,
    exp=lambda x: Number(_series(x).exp()),
    log=lambda x: Number(_series(x).log()),
    sqrt=lambda x: Number(_series(x).sqrt()),
    tanh=lambda x: 1 - 2 / (Number((2 * _series(x)).exp()) + 1),
    pi=lambda: _of(_flint().arb.pi()),
)


def _numbers(value: Any) -> Any:
    """Floating numbers and arrays exactly; integers and None as they are."""
    if isinstance(value, float):
        return _of(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        found = np.empty(value.shape, object)
        for at in np.ndindex(*value.shape):
            found[at] = _of(float(value[at]))
        return found
    return value


@contextmanager
def precision(bits: int) -> Iterator[None]:
    """Flint computes with so many bits within."""
    context = _flint().ctx
    before, context.prec = context.prec, bits
    try:
        yield
    finally:
        context.prec = before


class Enclosure(NamedTuple):
    """Balls of an output and of the gradients ⟨dy, ∂y⟩ by argument, as object arrays."""

    y: Array
    gradients: dict[str, Array]


def enclose(
    equation: Callable[..., Array],
    args: dict[str, Any],
    names: tuple[str, ...],
    dy: Array,
    bits: int = BITS,
) -> Enclosure:
    """Enclosures of an equation's value, and of the derivatives of ⟨dy, y⟩ in the arguments named."""
    with precision(bits), using(ARITHMETIC):
        given = {name: _numbers(value) for name, value in args.items()}
        y = _coefficients(np.asarray(equation(**given), object), 0)
        return Enclosure(y, {n: _gradient(equation, given, n, np.asarray(dy)) for n in names})


def _gradient(equation: Callable[..., Array], given: dict[str, Any], name: str, dy: Array) -> Array:
    flint, values = _flint(), given[name]
    found = np.empty(values.shape, object)
    for at in np.ndindex(*values.shape):
        moved = values.copy()
        moved[at] = Number(flint.arb_series([values[at].series[0], 1], prec=2))
        slopes = _coefficients(np.asarray(equation(**given | {name: moved}), object), 1)
        found[at] = sum((slopes[i] * float(dy[i]) for i in np.ndindex(*dy.shape)), flint.arb(0))
    return found


def _coefficients(numbers: Array, order: int) -> Array:
    found = np.empty(numbers.shape, object)
    for at in np.ndindex(*numbers.shape):
        found[at] = _series(numbers[at])[order]
    return found


def rounded(ball: Any) -> tuple[float, bool]:
    """The float64 in a ball, correctly rounded, and whether it is proven; 0 where 0 is not ruled out."""
    if ball.contains(0):
        return 0.0, bool(ball == 0)
    value = float(ball.mid())
    for guess in (value, np.nextafter(value, -np.inf), np.nextafter(value, np.inf)):
        if is_rounded(ball, float(guess)):
            return float(guess), True
    return value, False


def is_rounded(ball: Any, value: float) -> bool | None:
    """Whether a float64 is the correctly rounded number in a ball; None where the ball does not tell.

    All of the ball must lie between the two midpoints to the neighbours. A ball around 0 that is not
    exactly 0 does not tell.
    """
    arb = _flint().arb
    if value == 0:
        return True if ball == 0 else None if ball.contains(0) else False
    low, high = np.nextafter(value, -np.inf), np.nextafter(value, np.inf)
    with precision(WIDEST):
        below, above = (arb(value) + arb(float(end)) for end in (low, high))
        if bool(2 * ball > below) and bool(2 * ball < above):
            return True
        return False if bool(2 * ball < below) or bool(2 * ball > above) else None
