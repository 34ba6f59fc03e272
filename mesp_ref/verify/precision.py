"""The strongest oracle: the forward from its equation at 50 digits, differentiated numerically there.

Central differences with a step of 10^(−digits/3) leave about two thirds of the digits: 33 of 50,
twice what float64 holds. Done again at 80 digits, both must agree to 25 of them.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import Args
from mesp_ref.registry.row import taken
from mesp_ref.verify.result import Finding, compare, scalar
from mesp_ref.verify.subject import Subject

Equation = Callable[..., Array]

mp = mpmath.mp
ULP = 2.0**-52

_exact: Callable[[Array], Array] = np.frompyfunc(lambda x: mp.mpf(float(x)), 1, 1)


def exact(value: Any) -> Any:
    """Floating numbers and arrays as mpmath numbers, without rounding; all else as it is."""
    if isinstance(value, float):
        return mp.mpf(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.asarray(_exact(value), object)
    return value


def jacobian(equation: Equation, args: Args, wrt: str, digits: int) -> Array:
    """∂y/∂wrt of an equation at `digits` digits by central differences: [*wrt.shape, *y.shape]."""
    with mp.workdps(digits):
        point, step = (
            {key: exact(value) for key, value in args.items()},
            mp.mpf(10) ** -(digits // 3),
        )
        x = point[wrt]
        columns = []
        for at in np.ndindex(*x.shape):
            up, down = x.copy(), x.copy()
            up[at] += step
            down[at] -= step
            ahead, behind = (equation(**point | {wrt: side}) for side in (up, down))
            columns.append((ahead - behind) / (2 * step))
        return np.array(columns, object).reshape(*x.shape, *np.shape(columns[0]))


def true_value(equation: Equation, args: Args, digits: int = 50) -> Array:
    """y of an equation, rounded once to float64."""
    with mp.workdps(digits):
        y = equation(**{key: exact(value) for key, value in args.items()})
        return np.asarray(y, np.float64)


def true_gradients(
    subject: Subject, dy: Array, digits: tuple[int, ...] = (50, 80)
) -> tuple[dict[str, Array], Array]:
    """Every gradient, rounded once to float64 from the last of `digits`; and mag of the value.

    What lies below 1e-25·max is the error of the differences and counts as 0.

    Raises ArithmeticError when two precisions differ by more than that.
    """
    args, grads = equation_args(subject), {}
    mag_y = np.abs(true_value(equation_of(subject), args))
    for name in subject.differentiable:
        x, found = subject.args[name], []
        for d in digits:
            J = jacobian(equation_of(subject), args, name, d)
            with mp.workdps(d):
                terms = (J * exact(dy)).reshape(*x.shape, -1)
                found.append(np.asarray(terms.sum(axis=-1), object))
                noise = np.abs(terms).sum(axis=-1).max(initial=0) * mp.mpf("1e-25")
        if any((np.abs(other - found[-1]) > noise).any() for other in found):
            raise ArithmeticError(f"{subject.name}: {name}: {digits} digits differ")
        grads[name] = np.asarray(np.where(np.abs(found[-1]) <= noise, 0, found[-1]), np.float64)
        weights = np.abs(x).reshape(*x.shape, *[1] * dy.ndim)
        terms = np.abs(np.asarray(J, np.float64)) * weights
        mag_y = mag_y + terms.reshape(-1, *dy.shape).sum(axis=0)
    return grads, mag_y


def equation_args(subject: Subject) -> Args:
    """The arguments that the equation takes: a tiled op may have more."""
    return taken(equation_of(subject), subject.args)


def equation_of(subject: Subject) -> Equation:
    """The equation of a subject.

    Raises ValueError when it has none
    """
    if subject.equation is None:
        raise ValueError(f"{subject.name}: no equation to compute at more digits")
    return subject.equation


def precision(
    subject: Subject,
    rng: np.random.Generator,
    ulps: float = 4.0,
    digits: tuple[int, ...] = (50,),
) -> list[Finding]:
    """The value and every gradient against the truth rounded once to float64.

    Gate      `ulps` ulp of max(mag); of the value, mag_y = |y| + Σ |∂y/∂x|·|x| over all arguments,
              what rounding the arguments alone would change
    Sees      a wrong forward as well as a wrong backward
    """
    (dy,) = subject.cotangents(rng)
    (y,) = subject.forward(subject.args)
    grads, mags = subject.backward((dy,), subject.args), subject.magnitude((dy,), subject.args)
    truth, mag_y = true_gradients(subject, dy, digits)
    expected = true_value(equation_of(subject), equation_args(subject))
    meaning = f"Expected is the equation at {digits[-1]} digits, rounded once to float64."
    relative = ulps * ULP
    findings = [
        compare("precision", subject.name, "(the value)", y, expected, mag_y, relative, meaning)
    ]
    for name in subject.differentiable:
        findings.append(
            compare("precision", subject.name, name, grads[name], truth[name], mags[name],
                    relative, meaning)
        )  # fmt: skip
    return findings


def precision_directions(
    subject: Subject,
    rng: np.random.Generator,
    relative: float = 1e-13,
    digits: int = 50,
    joint: bool = False,
) -> list[Finding]:
    """The value, and one random direction per argument: for functions too large for every entry.

    With `joint`, one direction in all arguments at once.
    Gate      relative·⟨mag, |v|⟩; of the value, relative·max|y|
    """
    (dy,), args = subject.cotangents(rng), equation_args(subject)
    (y,) = subject.forward(subject.args)
    grads, mags = subject.backward((dy,), subject.args), subject.magnitude((dy,), subject.args)
    meaning = f"Expected is the equation differentiated at {digits} digits along a direction."
    truth = true_value(equation_of(subject), args, digits)
    findings = [
        compare(
            "precision", subject.name, "(the value)", y, truth, np.abs(truth), relative, meaning
        )
    ]
    each = [(name,) for name in subject.differentiable]
    for names in [subject.differentiable] if joint else each:
        v = {name: rng.standard_normal(subject.args[name].shape) for name in names}
        expected = _along(equation_of(subject), args, v, dy, digits)
        gate = relative * sum(float((mags[name] * np.abs(v[name])).sum()) for name in names)
        got = sum((grads[name] * v[name]).sum() for name in names)
        what = "all" if joint else names[0]
        findings.append(scalar("precision", subject.name, what, got, expected, gate, meaning))
    return findings


def _along(equation: Equation, args: Args, v: Args, dy: Array, digits: int) -> Any:
    """⟨dy, J·v⟩ of an equation by central differences at `digits` digits."""
    with mp.workdps(digits):
        point, step = {k: exact(a) for k, a in args.items()}, mp.mpf(10) ** -(digits // 3)
        ahead, behind = (
            equation(**point | {k: point[k] + side * step * exact(a) for k, a in v.items()})
            for side in (1, -1)
        )
        return np.sum((ahead - behind) / (2 * step) * exact(dy))
