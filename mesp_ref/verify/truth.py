"""The true gradient of a function nobody knows: complex step where it is right, else differences."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mesp_ref.verify.pair import Array, Arrays, Pair, eps
from mesp_ref.verify.slopes import Slope, diverges, extrapolated

STEP = 2.0**-200  # of the complex step: its square is below every rounding error
Direction = dict[int, Array]
_FAILED = (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, MemoryError,
           NotImplementedError, RuntimeError, TypeError, ValueError)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """Derivatives of ⟨dy, forward⟩ at a point.

    name   "complex step" or "richardson", and `why` it was chosen
    pair   the pair in the precision in which the derivatives are found
    dys    cotangents in that precision; 0 where the output is infinite
    unit   spacing at 1 of the numbers that the forward computes in
    size   ⟨|dy|, |forward|⟩
    """

    name: str
    why: str
    pair: Pair
    dys: Arrays
    unit: float
    size: float

    def along(self, v: Direction) -> Slope:
        """⟨dy, J·v⟩"""
        if self.name == "complex step":
            terms = self._terms(v)
            mag = sum(float(np.abs(t).sum()) for t in terms)
            value = float(sum(t.sum() for t in terms))
            return Slope(value, 4 * self.unit * mag, mag)
        centre = self._phi(v)

        def difference(h: float) -> float:
            return (centre(h) - centre(-h)) / (2 * h)

        value, error = extrapolated(difference, 16, self._reach(v), self.unit * self.size)
        return Slope(value, 4 * error, abs(value))

    def one_sided(self, v: Direction) -> tuple[Slope, Slope]:
        """Slopes towards +v and, as a slope along +v, from −v; not known where the function ends."""
        phi = replace(self, name="richardson")._phi(v)
        here, found = phi(0.0), []
        for side in (1, -1):

            def quotient(h: float, side: int = side) -> float:
                return side * (phi(side * h) - here) / h

            value, error = extrapolated(quotient, 4, self._reach(v), self.unit * self.size)
            if diverges(quotient, self._reach(v)):
                value, error = np.inf, np.inf
            found.append(Slope(value, 4 * error, abs(value)))
        return found[0], found[1]

    def is_constant(self, leaf: int) -> bool:
        """Does the forward stay where it is when this leaf is made twice, half, minus itself?"""
        x = self.pair.point[leaf]
        here = self.pair.floating()
        for factor in (-1.0, 0.5, 2.0, 0.0):
            try:
                moved = self.pair.at({leaf: x * x.dtype.type(factor)}).floating()
            except _FAILED:
                continue
            change = sum(
                float(np.abs(_product(dy, a - b)).sum())
                for dy, a, b in zip(self.dys, moved, here, strict=True)
            )
            if not change <= 64 * self.unit * self.size:
                return False
        return True

    def scale(self, leaf: int) -> Array:
        """A natural step for every entry: its own size, at least a thousandth of the others'."""
        size = np.abs(np.where(np.isfinite(self.pair.point[leaf]), self.pair.point[leaf], 0))
        size = np.asarray(size, np.float64)
        typical = float(np.sqrt((size * size).mean())) if size.size else 0.0
        return np.maximum(size, 2.0**-10 * typical if typical else 1.0)

    def extended(self) -> "Truth | None":
        """The same in the longest floating type, or None where that gives nothing more."""
        if self.name != "complex step" or eps(np.longdouble) >= eps(np.float64):
            return None
        dys = tuple(dy.astype(np.longdouble) for dy in self.dys)
        return replace(self, pair=self.pair.cast(np.longdouble), dys=dys, unit=eps(np.longdouble))

    def _phi(self, v: Direction) -> Callable[[float], float]:
        """h ↦ ⟨dy, forward(x + h·v)⟩; NaN where the forward raises."""

        def value(h: float) -> float:
            moved = {i: _moved(self.pair.point[i], h, step) for i, step in v.items()}
            try:
                outputs = self.pair.at(moved).floating()
                return float(sum(_product(d, y).sum() for d, y in zip(self.dys, outputs, strict=True)))
            except _FAILED:
                return float("nan")

        return value

    def _reach(self, v: Direction) -> float:
        """The h at which the first entry moves by its own scale."""
        most = max(float((np.abs(step) / self.scale(i)).max(initial=0)) for i, step in v.items())
        return 1 / most if most else 1.0

    def _terms(self, v: Direction) -> list[Array]:
        """dy·Im f(x + i·h·v)/h of every output; nothing is subtracted."""
        high = np.clongdouble if self.unit < eps(np.float64) else np.complex128
        point = {i: self.pair.point[i].astype(high) for i in self.pair.places}
        for i, step in v.items():
            point[i] = point[i] + 1j * (STEP * step)
        outputs = self.pair.at(point).floating()
        return [_product(d, y.imag / STEP) for d, y in zip(self.dys, outputs, strict=True)]


def _moved(x: Array, h: float, step: Array) -> Array:
    return np.where(np.isfinite(x), x + (h * step).astype(x.dtype), x)


def _product(dy: Array, y: Array) -> Array:
    """dy·y, 0 wherever dy is, an infinite y not excepted."""
    return dy * np.where(dy == 0, 0, y)


def choose(pair: Pair, dys: Arrays, rng: np.random.Generator) -> Truth:
    """Complex step if the forward runs on complex128, keeps its real part and agrees with differences
    in a random direction of every argument (which exposes .real, abs and comparisons)."""
    double, unit, why = _working(pair)
    made = double.floating()
    cast = tuple(np.asarray(dy, y.dtype) for dy, y in zip(dys, made, strict=True))
    size = sum(float(np.abs(_product(d, y)).sum()) for d, y in zip(cast, made, strict=True))
    real = Truth("richardson", why, double, cast, unit, size)
    if why:
        return real
    stepped = replace(
        real, name="complex step", why="which the forward allows and Richardson confirms"
    )
    blind = _refused(stepped) or _blind(stepped, real, rng)
    return replace(real, why=blind) if blind else stepped


def _working(pair: Pair) -> tuple[Pair, float, str]:
    """The pair in float64 where it computes there, else in its own dtype; its unit; why, if so."""
    own = max(eps(pair.point[i].dtype) for i in pair.places)
    lowest = next(pair.point[i].dtype for i in pair.places if eps(pair.point[i].dtype) == own)
    double = pair.cast(np.float64)
    try:
        outputs = double.floating()
    except _FAILED:
        outputs = ()
    if not outputs or any(y.dtype != np.float64 for y in outputs):
        return pair, own, f"in {lowest}, because the forward takes nothing else"
    values = np.concatenate([np.ravel(y[np.isfinite(y)]) for y in outputs])
    values = values[values != np.round(values)]
    inputs = np.concatenate([np.ravel(double.point[i]) for i in pair.places])
    for dtype in (np.float16, np.float32):
        if len(values) and own < eps(dtype) and np.array_equal(values.astype(dtype), values):
            if np.array_equal(inputs.astype(dtype), inputs):
                continue  # so simple that its results are exact
            return double, eps(dtype), f"in steps that {np.dtype(dtype)} resolves: it computes there"
    return double, eps(np.float64), ""


def _refused(truth: Truth) -> str:
    """Why complex numbers cannot go through the forward, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            high = truth.pair.at(
                {i: truth.pair.point[i].astype(np.complex128) for i in truth.pair.places}
            )
            for value, y in zip(high.floating(), truth.pair.floating(), strict=True):
                same = np.allclose(value.real, y, 1e-10, 1e-12, equal_nan=True)
                if value.dtype != np.complex128 or not same:
                    return "because the forward drops what is imaginary"
            return ""
    except Exception as error:  # a stranger's function may do anything with complex numbers
        return f"because the forward refuses complex128 with {type(error).__name__}"


def _blind(stepped: Truth, real: Truth, rng: np.random.Generator) -> str:
    """The leaf in which complex step disagrees with differences, said in words, or nothing.

    Where differences resolve nothing (a saturated function) they are asked again at smaller
    arguments, where the same code is tame.
    """
    for leaf in real.pair.places:
        v = {leaf: random_direction(real, leaf, rng)}
        for factor in (1.0, 0.5, 1 / 32):
            x = real.pair.point[leaf]
            there = real.pair.at({leaf: x * factor})
            try:
                one = replace(stepped, pair=there).along(v)
                other = replace(real, pair=there).along(v)
            except _FAILED as error:
                return f"because the forward refuses complex128 with {type(error).__name__}"
            if not abs(one.value - other.value) <= 1e-6 * abs(one.value) + other.error:
                if factor == 1.0 or other.known:
                    name = real.pair.names[leaf]
                    return f"because complex step is blind in {name}: .real, abs or a comparison?"
            if other.known:
                break
    return ""


def random_direction(truth: Truth, leaf: int, rng: np.random.Generator) -> Array:
    """Every entry moved by between half and three halves of its unit, either way.

    The unit is 1 for complex step and the entry's own size for differences; entries that are not
    finite stay.
    """
    x = truth.pair.point[leaf]
    v = rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1.0, 1.0], x.shape)
    if truth.name != "complex step":
        v = v * truth.scale(leaf)
    return np.where(np.isfinite(x), v, 0.0)
