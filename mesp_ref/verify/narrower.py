"""The same pair in narrower types: what is promoted on the way, and what goes wrong only there."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.verify.behaviour import finding
from mesp_ref.verify.pair import Array, Arrays, Pair, eps
from mesp_ref.verify.result import Finding

TAME = 1 / 8, 8.0  # magnitudes between which float16 can be asked at all
GROSS = 0.5  # of the gradient's size: an error that no rounding of tame numbers explains


def promotions(pair: Pair, dys: Arrays) -> tuple[list[Finding], str]:
    """float32 in, float32 out? One finding per gradient, and "kept", "promoted" or "refused"."""
    low = pair.cast(np.float32)
    try:
        outputs = low.floating()
    except Exception:  # float64-only: its users know
        return [], "refused"
    if any(y.dtype != np.float32 for y in outputs):
        return [], "promoted"
    cotangents = tuple(np.asarray(dy, np.float32) for dy in dys)
    try:
        grads = low.gradients(cotangents)
    except Exception as error:  # what the forward takes, the backward should
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return [finding("float32 stays float32", False, what)], "refused"
    found = []
    for leaf, grad in grads.items():
        dtype = low.point[leaf].dtype if grad is None else np.asarray(grad).dtype
        kept, meaning = dtype == np.float32, f"Gradient is {dtype}."
        found.append(finding("float32 stays float32", kept, meaning, pair.names[leaf]))
    return found, "kept" if all(f.passed for f in found) else "promoted"


def named(name: str) -> Any:
    """The dtype of a name.

    Raises MespRefError for one that is not a narrow floating type.
    """
    if name == "float16":
        return np.dtype(np.float16)
    if name != "bfloat16":
        raise MespRefError(f"dtypes: found {name!r}, expected float32, float16 or bfloat16")
    import ml_dtypes  # only where it is asked for

    return np.dtype(ml_dtypes.bfloat16)


def tame(values: Array) -> bool:
    """Zeros aside, nothing that a half precision number cannot hold comfortably."""
    size = np.abs(np.asarray(values, np.float64))
    size = size[size > 0]
    return bool(size.size) and TAME[0] <= size.max() <= TAME[1]


def half(pair: Pair, dys: Arrays, name: str) -> Iterator[Finding]:
    """In float16 or bfloat16 the gradient must not be grossly off where the forward is not.

    Asked only of tame inputs, where both stay finite and the forward keeps the type: sizes that
    overflow a count, an eps that is nothing, a mask in the wrong type show here.
    """
    if not all(tame(pair.point[i]) for i in pair.places):
        return
    # The same rounded numbers in both, so that a kink cannot lie between them.
    dtype = named(name)
    low = pair.cast(dtype)
    high = low.cast(np.float64)
    cotangents = tuple(np.asarray(dy, dtype) for dy in dys)
    try:
        narrow, wide = low.floating(), high.floating()
        if any(y.dtype != dtype for y in narrow):
            return
        found = low.gradients(cotangents)
        exact = high.gradients(tuple(dy.astype(np.float64) for dy in cotangents))
    except Exception:  # not made for float16, as is its right
        return
    if not all(_close(a, b) for a, b in zip(narrow, wide, strict=True)):
        return
    for leaf in pair.places:
        failed = _gross(found.get(leaf), exact.get(leaf), high.point[leaf], 0.0)
        if failed is not None:
            lost = _lost(high, leaf) * eps(dtype)
            failed = _gross(found.get(leaf), exact.get(leaf), high.point[leaf], lost)
        if failed is not None:
            error, got, expected, at = failed
            meaning = f"Right in float64, grossly wrong in {name}, where the forward is well."
            yield Finding(name, "your op", pair.names[leaf], error, GROSS * abs(expected),
                          meaning, at, got, expected, failed=True)  # fmt: skip


def _lost(pair: Pair, leaf: int) -> float:
    """What a type may cost a gradient, over its unit: as much as float32 costs it here and close by."""
    rng, worst = np.random.default_rng(0), 0.0
    for factor in (1.0, 0.9642857, 1.0357143):
        there = pair.at({i: pair.point[i] * factor for i in pair.places})
        dys = tuple(rng.standard_normal(y.shape).astype(np.float32) for y in there.floating())
        narrow = there.cast(np.float32).gradients(dys).get(leaf)
        rounded = there.cast(np.float32).cast(np.float64)
        wide = rounded.gradients(tuple(dy.astype(np.float64) for dy in dys)).get(leaf)
        if narrow is None or wide is None:
            return np.inf
        error = np.abs(np.asarray(narrow, np.float64) - np.asarray(wide, np.float64))
        worst = max(worst, float(error.max(initial=0)))
    return worst / eps(np.float32)


def _close(a: Array, b: Array) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(b)
    size = float(np.abs(b[finite]).max(initial=0))
    return bool(
        np.isfinite(a[finite]).all() and np.abs(a - b)[finite].max(initial=0) <= 0.02 * size
    )


def _gross(
    got: Any, exact: Any, x: Array, lost: float
) -> tuple[float, float, float, tuple[int, ...]] | None:
    """Error, value, truth and index of the worst entry where it is off by half the gradient's size.

    Equal numbers count by the mean of their errors: which of them a sort or a maximum takes first may
    differ from type to type.
    """
    if got is None or exact is None or eps(np.asarray(got).dtype) < eps(np.float16):
        return None
    if np.shape(got) != x.shape or np.shape(exact) != x.shape:  # promised for other shapes only
        return None
    a, b = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    size = float(np.abs(b).max(initial=0)) if np.isfinite(b).all() else 0.0
    if not np.isfinite(a).all() or size < 2.0**-20:  # far below the normal numbers of float16
        return None
    error = np.abs(_mean_of_equals(a - b, x))
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    if error[at] <= GROSS * size + 16 * lost:
        return None
    return float(error[at]), float(a[at]), float(b[at]), at


def _mean_of_equals(error: Array, x: Array) -> Array:
    """Every entry replaced by the mean over the entries where x is the same."""
    _, back, counts = np.unique(x.reshape(-1), return_inverse=True, return_counts=True)
    sums = np.bincount(back.reshape(-1), error.reshape(-1), len(counts))
    return np.asarray((sums / counts)[back.reshape(-1)].reshape(error.shape))
