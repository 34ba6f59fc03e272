"""The true gradient of a function nobody knows: complex step where it is right, else differences."""

import warnings
from typing import NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.verify.oracles import STEP, directional, indices
from mesp_ref.verify.subject import Arrays, Subject, inner

ENTRIES = 300  # of each argument that are looked at, drawn when there are more


class Truth(NamedTuple):
    """A gradient where `looked`, its Σ|dy·∂y/∂x|, and an absolute floor for what rounding may do."""

    value: Array
    mag: Array
    looked: Array
    floor: float


class Method(NamedTuple):
    """How the truth is found, why that way, and the subject in the precision it is found in."""

    name: str
    why: str
    subject: Subject


def choose(subject: Subject, dys: Arrays, rng: np.random.Generator) -> Method:
    """Complex step if the forward runs on complex128, keeps its real part and agrees with Richardson
    in one random direction per argument (which exposes .real, abs and comparisons)."""
    double = _in_float64(subject)
    if double is None:
        return Method("richardson", "in float32, because the forward takes nothing else", subject)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            values = double.forward(double.cast(np.complex128).args)
            for value, y in zip(values, double.forward(double.args), strict=True):
                if value.dtype != np.complex128 or not np.allclose(value.real, y, 1e-10, 1e-12):
                    return Method(
                        "richardson", "because the forward drops what is imaginary", double
                    )
            for name in double.differentiable:
                v = rng.standard_normal(double.args[name].shape)
                stepped = inner(dys, double.tangent({name: v}, STEP))
                expected, estimate = directional(double, dys, name, v)
                tame = double.at(**{name: double.args[name] / 32}).tangent({name: v}, STEP)
                size = max(abs(expected), abs(inner(dys, tame)))
                if not abs(stepped - expected) <= 1e-6 * size + 10 * estimate:
                    why = f"because complex step is blind in {name}: .real, abs or a comparison?"
                    return Method("richardson", why, double)
    except Exception as error:  # a stranger's function may do anything with complex numbers
        why = f"because the forward refuses complex128 with {type(error).__name__}"
        return Method("richardson", why, double)
    return Method("complex step", "which the forward allows and Richardson confirms", double)


def _in_float64(subject: Subject) -> Subject | None:
    """The subject at the same numbers in float64, or None where it cannot compute there."""
    double = subject.cast(np.float64)
    try:
        outputs = double.forward(double.args)
    except Exception:  # float32-only
        return None
    return double if all(y.dtype == np.float64 for y in outputs) else None


def gradient(method: Method, dys: Arrays, name: str, seed: int) -> Truth:
    """∂⟨dy, forward⟩/∂argument, entry by entry.

    Floor     what the differences themselves may err, plus 32u times the size of terms that may
              have cancelled: the largest mag here and at the argument scaled by 1/32 (a function
              that saturates has its slope elsewhere), and ⟨|dy|, |f|⟩/max|x| (one that is
              homogeneous loses the part along x). No arithmetic gets closer than their rounding.
    """
    subject = method.subject
    x = subject.args[name]
    value, mag, looked, error = _entries(method, dys, name, x, seed)
    _, tame, _, _ = _entries(method, dys, name, x / 32, seed)
    u = float(np.finfo(x.dtype).eps) / 2
    outputs = zip(dys, subject.forward(subject.args), strict=True)
    along = sum(np.abs(dy * y).sum() for dy, y in outputs) / (np.abs(x).max(initial=0) or 1.0)
    scale = max(mag.max(initial=0), tame.max(initial=0), along)
    return Truth(value, mag, looked, error + 32 * u * float(scale))


def _entries(
    method: Method, dys: Arrays, name: str, x: Array, seed: int
) -> tuple[Array, Array, Array, float]:
    """Value, mag, which entries were looked at, and the error of the differences, at x."""
    subject, error = method.subject.at(**{name: x}), 0.0
    value, mag, looked = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape, bool)
    for at in indices(x, np.random.default_rng(seed), ENTRIES):
        unit = np.zeros_like(x)
        unit[at] = looked[at] = 1
        if method.name == "complex step":
            columns = subject.tangent({name: unit}, STEP)
            value[at] = inner(dys, columns)
            mag[at] = sum(np.abs(dy * c).sum() for dy, c in zip(dys, columns, strict=True))
        else:
            value[at], estimate = directional(subject, dys, name, unit)
            mag[at], error = abs(value[at]), max(error, 10 * estimate)
    return value, mag, looked, error
