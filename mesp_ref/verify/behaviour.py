"""How a backward must behave, whatever it computes: pure, repeatable, linear, true to its dtype."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.verify.result import Finding, compare
from mesp_ref.verify.subject import Arrays, Subject


def finding(check: str, ok: bool, meaning: str, argument: str = "all") -> Finding:
    """A check that holds or does not."""
    return Finding(check, "your op", argument, 0.0 if ok else np.inf, 0.0, meaning)


def check(
    subject: Subject, dys: Arrays, rng: np.random.Generator, floors: dict[str, float]
) -> Iterator[Finding]:
    """Every behaviour of a subject's backward; `floors` is what rounding may do to each gradient."""
    yield from pure(subject, dys)
    yield from linear(subject, dys, rng, floors)
    yield from layouts(subject, dys, floors)
    yield from single(subject, dys)


def _arrays(subject: Subject) -> dict[str, Array]:
    return {name: a for name, a in subject.args.items() if isinstance(a, np.ndarray)}


def pure(subject: Subject, dys: Arrays) -> Iterator[Finding]:
    """Inputs and cotangents stay as they were, and a second call gives the same bits."""
    before = {name: array.copy() for name, array in _arrays(subject).items()}
    kept = [dy.copy() for dy in dys]
    first = {n: np.array(g) for n, g in subject.backward(dys, subject.args).items()}
    again = subject.backward(dys, subject.args)
    for name, array in _arrays(subject).items():
        same = np.array_equal(array, before[name], equal_nan=array.dtype.kind in "fc")
        yield finding("inputs unchanged", same, "The call wrote into its input.", name)
    same = all(np.array_equal(dy, old) for dy, old in zip(dys, kept, strict=True))
    yield finding("inputs unchanged", same, "The call wrote into the cotangent.", "dy")
    for name, grad in first.items():
        same = np.array_equal(grad, again[name])
        yield finding("repeatable", same, "Two calls with the same inputs differ.", name)


def linear(
    subject: Subject, dys: Arrays, rng: np.random.Generator, floors: dict[str, float]
) -> Iterator[Finding]:
    """backward(2·dy₁ − dy₂) = 2·backward(dy₁) − backward(dy₂)"""
    others = subject.cotangents(rng)
    mixed = tuple(2 * a - b for a, b in zip(dys, others, strict=True))
    one, two, both = (subject.backward(d, subject.args) for d in (dys, others, mixed))
    for name, got in both.items():
        expected = 2 * one[name] - two[name]
        mag = 2 * np.abs(one[name]) + np.abs(two[name])
        relative = 1e-4 if got.dtype == np.float32 else 1e-9
        meaning = "A vector-Jacobian product is linear in dy; expected 2·g(dy₁) − g(dy₂)."
        scale = np.full_like(mag, max(mag.max(initial=0), np.finfo(mag.dtype).tiny))
        yield compare(
            "linear in dy", "your op", name, got, expected, scale, relative, meaning,
            floor=16 * floors[name],
        )  # fmt: skip


def layouts(subject: Subject, dys: Arrays, floors: dict[str, float]) -> Iterator[Finding]:
    """Arrays that are views with strides, and read-only ones, give the same gradients."""
    expected = subject.backward(dys, subject.args)
    strided = {n: np.repeat(a[..., None], 2, -1)[..., 0] for n, a in _arrays(subject).items()}
    frozen = {n: a.copy() for n, a in _arrays(subject).items()}
    for array in frozen.values():
        array.flags.writeable = False
    for what, arrays in (("non-contiguous inputs", strided), ("read-only inputs", frozen)):
        try:
            found = subject.backward(dys, subject.args | arrays)
        except Exception as error:  # whatever a stranger's function raises
            yield finding(what, False, f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        for name, grad in expected.items():
            rtol = 1e-5 if grad.dtype == np.float32 else 1e-12
            atol = rtol * float(np.abs(grad).max(initial=0)) + floors[name]
            same = np.allclose(found[name], grad, rtol=0, atol=atol)
            yield finding(what, same, "The gradient depends on the memory layout.", name)


def single(subject: Subject, dys: Arrays) -> Iterator[Finding]:
    """float32 in, float32 out: no silent promotion; skipped where float32 is refused."""
    floating = {n: a for n, a in _arrays(subject).items() if a.dtype.kind == "f"}
    low = subject.at(**{name: array.astype(np.float32) for name, array in floating.items()})
    try:
        outputs = low.forward(low.args)
    except Exception:  # float64-only: its users know
        return
    for y in outputs:
        yield finding(
            "float32 stays float32", y.dtype == np.float32, f"Forward gave {y.dtype}.", "y"
        )
    if all(y.dtype == np.float32 for y in outputs):
        cotangents = tuple(np.asarray(dy, np.float32) for dy in dys)
        for name, grad in low.backward(cotangents, low.args).items():
            right = np.asarray(grad).dtype == np.float32
            yield finding("float32 stays float32", right, f"Gradient is {grad.dtype}.", name)
