"""Oracles of a backward pass that need nothing but the forward, strongest first.

Each takes a Subject and a random generator and returns findings. A wrong forward with its own right
backward passes them all: forwards are held against `equations` at 50 digits (see precision.py).
"""

import math
from collections.abc import Callable

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.verify.result import Finding, compare, misfit, scalar
from mesp_ref.verify.subject import Arrays, Subject, inner

STEP = 2.0**-200  # of the complex step: its square is below every rounding error


def indices(x: Array, rng: np.random.Generator, limit: int | None) -> list[tuple[int, ...]]:
    """All indices of x, or `limit` of them drawn without replacement."""
    flat = np.arange(x.size)
    if limit is not None and limit < x.size:
        flat = np.sort(rng.choice(x.size, limit, replace=False))
    return [tuple(int(i) for i in np.unravel_index(at, x.shape)) for at in flat]


def complex_step(
    subject: Subject,
    rng: np.random.Generator,
    relative: float = 1e-14,
    entries: int | None = None,
) -> list[Finding]:
    """Every entry (or `entries` drawn ones per argument) against Im⟨dy, f(x + i·h·e)⟩/h.

    Exact to rounding in float64: nothing is subtracted, so h can be 2⁻²⁰⁰.
    Gate      relative·max(mag)
    Needs     a forward that is analytic: no abs, no comparison of imaginary parts
    Source    Squire & Trapp 1998
    """
    dys = subject.cotangents(rng)
    grads, mags = subject.backward(dys, subject.args), subject.magnitude(dys, subject.args)
    meaning = "Expected is the derivative by complex step, exact to rounding in float64."
    findings = []
    for name in subject.differentiable:
        x = subject.args[name]
        wrong = misfit(grads[name], x)
        if wrong is not None:
            findings.append(Finding("complex_step", subject.name, name, math.inf, 0.0, wrong + "."))
            continue
        expected, looked = np.zeros_like(x), np.zeros(x.shape, bool)
        for at in indices(x, rng, entries):
            unit = np.zeros_like(x)
            unit[at] = 1
            expected[at] = inner(dys, subject.tangent({name: unit}, STEP))
            looked[at] = True
        got = np.where(looked, grads[name], 0)
        findings.append(
            compare("complex_step", subject.name, name, got, expected, mags[name],
                    relative, meaning)
        )  # fmt: skip
    return findings


def adjoint(subject: Subject, rng: np.random.Generator, relative: float = 1e-14) -> list[Finding]:
    """⟨u, J·v⟩ = ⟨Jᵀ·u, v⟩ for random u and v, J·v by complex step: one forward per argument.

    Gate      relative·⟨mag, |v|⟩
    """
    dys = subject.cotangents(rng)
    grads, mags = subject.backward(dys, subject.args), subject.magnitude(dys, subject.args)
    meaning = "⟨Jᵀu, v⟩ by the backward against ⟨u, Jv⟩ by complex step, random u and v."
    findings = []
    for name in subject.differentiable:
        v = rng.standard_normal(subject.args[name].shape)
        gate = relative * float((mags[name] * np.abs(v)).sum())
        wrong = misfit(grads[name], v)
        if wrong is not None:
            findings.append(Finding("adjoint", subject.name, name, math.inf, gate, wrong + "."))
            continue
        expected = inner(dys, subject.tangent({name: v}, STEP))
        got = (grads[name] * v).sum()
        findings.append(scalar("adjoint", subject.name, name, got, expected, gate, meaning))
    return findings


def hessian_symmetry(
    subject: Subject, rng: np.random.Generator, relative: float = 1e-12
) -> list[Finding]:
    """⟨u, H·v⟩ = ⟨v, H·u⟩ with H·v = Im g(x + i·h·v)/h, g the backward: is g a gradient at all?

    Gate      relative·(Σ|u|·|H·v| + Σ|v|·|H·u|) over all arguments together
    Blind to  a gradient of the wrong function, such as one scaled by 2
    """
    dys = tuple(dy.astype(np.complex128) for dy in subject.cotangents(rng))
    point = subject.cast(np.complex128).args

    def draw() -> dict[str, Array]:
        return {n: rng.standard_normal(point[n].shape) for n in subject.differentiable}

    def product(v: dict[str, Array]) -> dict[str, Array]:
        moved = point | {name: point[name] + 1j * STEP * v[name] for name in v}
        return {name: g.imag / STEP for name, g in subject.backward(dys, moved).items()}

    u, v = draw(), draw()
    try:
        hu, hv = product(u), product(v)
        left, right = (sum((a[n] * b[n]).sum() for n in u) for a, b in ((u, hv), (v, hu)))
        size = sum((np.abs(u[n] * hv[n]) + np.abs(v[n] * hu[n])).sum() for n in u)
    except (ValueError, TypeError) as error:  # a backward that cannot run on complex values
        wrong = f"{type(error).__name__}: {error}"
        return [Finding("hessian", subject.name, "all", math.inf, 0.0, wrong)]
    meaning = "⟨u, Hv⟩ against ⟨v, Hu⟩: they differ, so the backward is the gradient of nothing."
    names = ", ".join(subject.differentiable)
    return [scalar("hessian", subject.name, names, left, right, relative * size, meaning)]


LEVELS = 6  # of Richardson's tableau: steps from h down to h/32
FIRST_STEPS = (2.0**-3, 2.0**-9, 2.0**-15)  # of max|x|: a function may live on a finer scale


def _extrapolated(difference: Callable[[float], float], step: float) -> tuple[float, float]:
    """Ridders' tableau over step, step/2, …: the best value and an estimate of its error.

    Column k removes the term of order h^(2k); the estimate is the distance to the two entries a
    value was made from, and the entry with the smallest estimate wins (Numerical Recipes 5.7).
    """
    table: list[list[float]] = []
    best, error = math.nan, math.inf
    for level in range(LEVELS):
        row = [difference(step / 2**level)]
        for k in range(level):
            row.append(row[k] + (row[k] - table[-1][k]) / (4 ** (k + 1) - 1))
            estimate = max(abs(row[-1] - row[-2]), abs(row[-1] - table[-1][k]))
            if estimate <= error:
                best, error = row[-1], estimate
        table.append(row)
    return best, error


def directional(subject: Subject, dys: Arrays, name: str, v: Array) -> tuple[float, float]:
    """⟨dy, J·v⟩ in one argument by Richardson's central differences, with an error estimate.

    The estimate is that of the tableau plus what rounding f(x ± h·v) does to its last row,
    8u·⟨|dy|, |f|⟩/h, u the unit roundoff of the argument's dtype; the best first step wins, the first
    that leaves 1e-11 ends the search.
    """
    x = subject.args[name]
    scale = float(np.abs(x).max(initial=0)) / float(np.abs(v).max(initial=1)) or 1.0

    def difference(h: float) -> float:
        up, down = (subject.at(**{name: x + side * h * v}) for side in (1, -1))
        ahead, behind = up.forward(up.args), down.forward(down.args)
        change = tuple(a - b for a, b in zip(ahead, behind, strict=True))
        return float(inner(dys, change)) / (2 * h)

    outputs = zip(dys, subject.forward(subject.args), strict=True)
    size = sum(float(np.abs(dy * y).sum()) for dy, y in outputs)
    found = []
    for first in FIRST_STEPS:
        value, estimate = _extrapolated(difference, first * scale)
        rounding = 4 * float(np.finfo(x.dtype).eps) * size * 2 ** (LEVELS - 1) / (first * scale)
        found.append((estimate + rounding, value))
        if estimate + rounding <= 1e-11 * abs(value):
            break
    error, value = min(found)
    return value, error


def richardson(subject: Subject, rng: np.random.Generator, relative: float = 1e-9) -> list[Finding]:
    """Random directions in every argument against extrapolated central differences.

    Uses only real values of the forward, so it also holds a function that complex step cannot see
    through. Gate: relative·⟨mag, |v|⟩ plus ten times the estimated error of the differences.
    """
    dys = subject.cotangents(rng)
    grads, mags = subject.backward(dys, subject.args), subject.magnitude(dys, subject.args)
    findings = []
    for name in subject.differentiable:
        v = rng.standard_normal(subject.args[name].shape)
        expected, estimate = directional(subject, dys, name, v)
        gate = relative * float((mags[name] * np.abs(v)).sum()) + 10 * estimate
        wrong = misfit(grads[name], v)
        if wrong is not None:
            findings.append(Finding("richardson", subject.name, name, math.inf, gate, wrong + "."))
            continue
        meaning = f"Extrapolated central differences, their own error about {estimate:.1g}."
        got = (grads[name] * v).sum()
        findings.append(scalar("richardson", subject.name, name, got, expected, gate, meaning))
    return findings


def float32(
    subject: Subject, rng: np.random.Generator, k: int, roundings: int = 1
) -> list[Finding]:
    """Gradients in float32 against those in float64 from the same float32 numbers.

    Gate      entry by entry (s·u + 4·√k·u)·mag + s·η: s roundings to storage, sums of length k,
              u = 2⁻²⁴, η half the smallest subnormal; errors here are in units of that gate
    """
    single = subject.cast(np.float32)
    dys = tuple(np.asarray(dy, np.float32) for dy in single.cotangents(rng))
    exact, double = single.cast(np.float64), tuple(dy.astype(np.float64) for dy in dys)
    truth, mags = exact.backward(double, exact.args), exact.magnitude(double, exact.args)
    u, eta = 2.0**-24, 2.0**-150
    findings = []
    for name, got in single.backward(dys, single.args).items():
        gate = (roundings + 4 * math.sqrt(k)) * u * mags[name] + roundings * eta
        meaning = "Got in float32, expected in float64; the error is in units of the bound."
        wrong = misfit(got, single.args[name])
        ratio = math.inf if wrong else np.abs(got - truth[name]) / gate
        worst = np.unravel_index(int(np.argmax(ratio)), np.shape(ratio))
        index = tuple(int(i) for i in worst)
        findings.append(
            Finding("float32", subject.name, name, float(np.max(ratio, initial=0)), 1.0,
                    f"{wrong}." if wrong else meaning, index)
        )  # fmt: skip
    return findings
