"""Check a gradient of anyone's: a forward and a backward as plain functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array
from mesp_ref.verify import behaviour, numeric
from mesp_ref.verify.result import Finding, compare, misfit
from mesp_ref.verify.subject import Arrays, Subject

_SCOPE = (
    "This proves the backward against the forward that was given; whether that forward is the "
    "function you meant, it cannot see."
)


@dataclass(frozen=True)
class GradcheckResult:
    """What gradcheck found.

    passed     every finding passed
    findings   one per argument and check, in the order they were made
    method     "complex step" or "richardson", and `why` it was chosen
    """

    findings: tuple[Finding, ...]
    method: str
    why: str

    @property
    def passed(self) -> bool:
        return bool(self.findings) and all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        verdict = "gradcheck passed" if self.passed else "gradcheck FAILED"
        lines = [f"{verdict}: truth by {self.method}, {self.why}"]
        shown = self.findings if self.passed else self.failures
        return "\n".join([*lines, *(f"  {finding}" for finding in shown), _SCOPE])


def gradcheck(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    differentiable: Sequence[int] | None = None,
    seed: int = 0,
    rtol: float | None = None,
) -> GradcheckResult:
    """Is `backward` the vector-Jacobian product of `forward` at `args`?

    forward(*args) -> y, or a tuple of outputs
    backward(dy, *args) -> the gradients of the differentiable arguments, as a tuple in their order
        (alone when there is one); dy is a tuple when the forward returns one. A gradient for every
        argument is also accepted: None for those that have none
    names           for messages; default arg0, arg1, …
    differentiable  positions with a gradient; default: every argument that is a floating array
    rtol            of max Σ|dy·∂y/∂x|; default 1e-10 in float64, 1e-5 in float32

    Truth is complex step where the forward allows it: it runs on complex128, its real part stays,
    and one Richardson direction agrees (which exposes .real, abs and comparisons). Otherwise it is
    Richardson's central differences with their error estimate; a function that takes nothing but
    float32 is differenced in float32.

    Also checked: shape, dtype and finiteness of every gradient; inputs unchanged; repeatable; linear
    in the cotangent; the same for non-contiguous and read-only inputs; float32 in gives float32 out.

    Raises MespRefError only for misuse: no floating argument, names or positions that do not fit.
    """
    subject = _subject(forward, backward, args, names, differentiable)
    rng = np.random.default_rng(seed)
    dys = subject.cotangents(rng)
    if not all(np.isfinite(y).all() for y in subject.forward(subject.args)):
        raise MespRefError("forward: found NaN or infinity at args, expected finite outputs")
    method = numeric.choose(subject, dys, rng)
    try:
        grads = subject.backward(dys, subject.args)
        truths = {n: numeric.gradient(method, dys, n, seed) for n in subject.differentiable}
        findings = [_value(subject, n, grads[n], truths[n], method.name, rtol) for n in truths]
        if all(np.isfinite(finding.error) for finding in findings):
            floors = {name: truth.floor for name, truth in truths.items()}
            findings += behaviour.check(subject, dys, rng, floors)
    except Exception as error:  # a backward that raises is a wrong backward, not misuse
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        findings = [behaviour.finding("the backward runs", False, what)]
    return GradcheckResult(tuple(findings), method.name, method.why)


def _value(
    subject: Subject, name: str, got: Any, truth: numeric.Truth, by: str, rtol: float | None
) -> Finding:
    """One gradient against the truth, entry by entry."""
    x = subject.args[name]
    wrong = misfit(got, x)
    if wrong is not None:
        return Finding(by, subject.name, name, math.inf, 0.0, wrong + ".")
    single = x.dtype == np.float32
    relative = rtol if rtol is not None else 1e-5 if single else 1e-10
    shown = np.where(truth.looked, got, 0).astype(np.float64)
    mag = np.maximum(truth.mag, np.finfo(np.float64).tiny)  # no zero here is known to be structural
    meaning = f"Expected is the derivative by {by} of ⟨dy, forward⟩; {name} is {list(x.shape)}."
    return compare(by, subject.name, name, shown, truth.value, mag, relative, meaning, truth.floor)


def _subject(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    names: Sequence[str] | None,
    differentiable: Sequence[int] | None,
) -> Subject:
    labels = list(names or (f"arg{i}" for i in range(len(args))))
    if len(labels) != len(args) or len(set(labels)) != len(labels):
        raise MespRefError(f"names: found {labels}, expected {len(args)} different names")
    floating = [isinstance(a, np.ndarray) and a.dtype.kind == "f" for a in args]
    at = (
        [i for i, f in enumerate(floating) if f] if differentiable is None else list(differentiable)
    )
    if not at or any(not 0 <= i < len(args) or not floating[i] for i in at):
        raise MespRefError(
            f"differentiable: found positions {at}, expected at least one floating NumPy array "
            f"among {len(args)} arguments"
        )
    chosen = tuple(labels[i] for i in at)

    def run(given: dict[str, Any]) -> Arrays:
        y = forward(*given.values())
        return tuple(np.asarray(part) for part in (y if isinstance(y, tuple) else (y,)))

    several = isinstance(forward(*args), tuple)

    def back(dys: Arrays, given: dict[str, Any]) -> dict[str, Array]:
        found = backward(dys if several else dys[0], *given.values())
        parts = found if isinstance(found, tuple | list) else (found,)
        if len(parts) == len(labels) != len(chosen):
            parts = [parts[i] for i in at]
        if len(parts) != len(chosen):
            raise ValueError(f"{len(parts)} gradients returned, expected one each for {chosen}")
        return dict(zip(chosen, parts, strict=True))

    return Subject("your op", dict(zip(labels, args, strict=True)), chosen, run, back, _unknown)


def _unknown(dys: Arrays, args: dict[str, Any]) -> dict[str, Array]:
    raise AssertionError("never asked: magnitudes come from the Jacobian, see numeric.py")
