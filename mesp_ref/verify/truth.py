"""The true gradient of a function nobody knows: complex step where it is right, else differences."""

import warnings
from dataclasses import dataclass, replace

import numpy as np

from mesp_ref.verify.pair import Array, Arrays, Pair, eps
from mesp_ref.verify.slopes import Slope, diverges, extrapolated

STEP = 2.0**-200  # of the complex step: its square is below every rounding error
_JUMP = 2.0**150  # more than any slope: an output itself was divided by the step, at a jump
_SECOND = 2.0**-380  # what lies below comes from the square of the step
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
    step   of the complex step
    """

    name: str
    why: str
    pair: Pair
    dys: Arrays
    unit: float
    size: float
    step: float = STEP

    def along(self, v: Direction, finer: float = 1.0) -> Slope:
        """⟨dy, J·v⟩; `finer` shortens the steps of differences."""
        if self.name == "complex step":
            terms = self._terms(v)
            mag = sum(float(np.abs(t).sum()) for t in terms)
            value = float(sum(t.sum() for t in terms))
            if not mag < _JUMP:
                return Slope(np.nan, np.inf)
            return Slope(value, 4 * self.unit * mag + _SECOND, mag)
        probe = _Probe(self, v)
        value, error = extrapolated(probe.central, 2, self._reach(v) * finer, probe.rounding)
        if value == 0 == error:  # nothing moved: so little would not have been seen
            error = self.unit * self.size / self._reach(v) / finer
        return Slope(value, 10 * error, abs(value))

    def one_sided(self, v: Direction, finer: float = 1.0) -> tuple[Slope, Slope]:
        """Slopes towards +v and, as a slope along +v, from −v; not known where the function ends.

        Their mag is the slope to a point far off, a measure of what counts as nothing here.
        """
        found = []
        for side in (1, -1):
            probe, reach = _Probe(self, v, side), self._reach(v) * finer
            value, error = extrapolated(probe.one_sided, 1, reach, probe.rounding)
            if error > 1e-3 * abs(value) and diverges(probe.one_sided, reach):
                value, error = np.inf, np.inf
            found.append(Slope(value, 10 * error, abs(probe.one_sided(reach / 4))))
        return found[0], found[1]

    def is_constant(self, leaf: int) -> bool:
        """Does the forward stay where it is when this leaf is twice, half, minus itself, or moved?"""
        x = self.pair.point[leaf]
        here = self.pair.floating()
        moves = [x * x.dtype.type(factor) for factor in (-1.0, 0.5, 2.0, 0.0)]
        moves += [(x + side * self.scale(leaf)).astype(x.dtype) for side in (0.75, -0.75)]
        for there in moves:  # a factor leaves zeros where they are
            try:
                moved = self.pair.at({leaf: there}).floating()
            except _FAILED:
                continue
            change = sum(
                float(np.abs(_product(dy, a - b)).sum())
                for dy, a, b in zip(self.dys, moved, here, strict=True)
            )
            if not change <= min(64 * self.unit, 1e-5) * self.size:
                return False
        return True

    def closer(self, sizes: Array) -> "Truth | None":
        """The same with a shorter step where that leads past a number, as at log(1e-300), or None."""
        least = float(sizes.min(initial=1.0))
        if self.name != "complex step" or not 2.0**-1000 < least < 2.0**-100:
            return None
        return replace(self, step=min(self.step, least * 2.0**-30))

    def scale(self, leaf: int) -> Array:
        """A natural step for every entry."""
        return _scale(self.pair.point[leaf])

    def extended(self) -> "Truth | None":
        """The same in the longest floating type, or None where that gives nothing more."""
        if self.name != "complex step" or eps(np.longdouble) >= eps(np.float64):
            return None
        dys = tuple(dy.astype(np.longdouble) for dy in self.dys)
        return replace(self, pair=self.pair.cast(np.longdouble), dys=dys, unit=eps(np.longdouble))

    def _reach(self, v: Direction) -> float:
        """The h at which the first entry moves by its own scale."""
        most = max(float((np.abs(step) / self.scale(i)).max(initial=0)) for i, step in v.items())
        return 1 / most if most else 1.0

    def _terms(self, v: Direction) -> list[Array]:
        """dy·Im f(x + i·h·v)/h of every output; nothing is subtracted."""
        high = np.clongdouble if self.unit < eps(np.float64) else np.complex128
        point = {i: self.pair.point[i].astype(high) for i in self.pair.places}
        for i, step in v.items():
            point[i] = point[i] + 1j * (self.step * step)
        outputs = self.pair.at(point).floating()
        return [_product(d, y.imag / self.step) for d, y in zip(self.dys, outputs, strict=True)]


class _Probe:
    """Differences of ⟨dy, forward⟩ along a direction, and how far rounding may err them.

    Outputs that a step leaves alone cancel bit by bit and count for nothing.
    """

    def __init__(self, truth: Truth, v: Direction, side: int = 1):
        self.truth, self.v, self.side = truth, v, side
        self.moved = 0.0  # ⟨|dy|, |y|⟩ over the outputs that moved at the largest step
        self.here = self._outputs(0.0)

    def central(self, h: float) -> float:
        """(φ(h) − φ(−h))/2h; NaN where the forward raises."""
        return self._change(self._outputs(h), self._outputs(-h)) / (2 * h)

    def one_sided(self, h: float) -> float:
        """(φ(±h) − φ(0))/±h"""
        return self._change(self._outputs(self.side * h), self.here) / (self.side * h)

    def rounding(self) -> float:
        """Of a difference."""
        return self.truth.unit * self.moved

    def _outputs(self, h: float) -> Arrays | None:
        point = self.truth.pair.point
        moved = {i: _moved(point[i], h, step) for i, step in self.v.items()}
        try:
            return self.truth.pair.at(moved).floating()
        except _FAILED:
            return None

    def _change(self, up: Arrays | None, down: Arrays | None) -> float:
        if up is None or down is None:
            return float("nan")
        change = size = 0.0
        try:
            for dy, a, b in zip(self.truth.dys, up, down, strict=True):
                change += float(_product(dy, a - b).sum())
                if not self.moved:
                    size += float(np.abs(_product(dy, np.where(a == b, 0, a))).sum())
        except ValueError:  # another shape over there
            return float("nan")
        self.moved = max(self.moved, size) if np.isfinite(size) else 0.0
        return change


def _scale(x: Array) -> Array:
    """The size of every entry, at least a thousandth of the others'; 1 where all are 0."""
    size = np.asarray(np.abs(np.where(np.isfinite(x), x, 0)), np.float64)
    typical = float(np.sqrt((size * size).mean())) if size.size else 0.0
    return np.maximum(size, 2.0**-10 * typical if typical else 1.0)


def _moved(x: Array, h: float, step: Array) -> Array:
    return x + (h * step).astype(x.dtype)  # a step is 0 where x is not finite


def _product(dy: Array, y: Array) -> Array:
    """dy·y, 0 wherever dy is, an infinite y not excepted."""
    product = dy * y
    return product if np.isfinite(product.sum()) else dy * np.where(dy == 0, 0, y)


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
    return double, *_resolution(double)


def _resolution(double: Pair) -> tuple[float, str]:
    """Does a forward that is given float64 compute in a narrower type? Its numbers tell.

    Asked a little off the point, where no result is a round number by chance.
    """
    rng = np.random.default_rng(0)
    nearby = {
        i: double.point[i] + 2.0**-12 * _scale(double.point[i]) * rng.random(double.point[i].shape)
        for i in double.places
    }
    try:
        outputs = double.at(nearby).floating()
    except _FAILED:  # the point has no neighbours
        return eps(np.float64), ""
    values = np.concatenate([np.ravel(y[np.isfinite(y)]) for y in outputs])
    values = values[values != np.round(values)]
    for dtype in (np.float16, np.float32):
        if len(values) and np.array_equal(values.astype(dtype), values):
            return eps(dtype), f"in steps that {np.dtype(dtype)} resolves: it computes there"
    return eps(np.float64), ""


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
            agree = abs(one.value - other.value) <= 1e-6 * abs(one.value) + other.error
            if not agree and (factor == 1.0 or other.known):
                name = real.pair.names[leaf]
                return f"because complex step is blind in {name}: .real, abs or a comparison?"
            if other.known:
                break
    return ""


def random_direction(truth: Truth, leaf: int, rng: np.random.Generator) -> Array:
    """Every entry moved by between half and three halves of its unit, either way.

    The unit is 1 for complex step and the entry's own size for differences, which must not step
    across 0; entries that are not finite stay.
    """
    x = truth.pair.point[leaf]
    v = rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1.0, 1.0], x.shape)
    if truth.name != "complex step":
        size = np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64)
        v = v * np.where(size > 0, size, truth.scale(leaf))
    return np.where(np.isfinite(x), v, 0.0)
