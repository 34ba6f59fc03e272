"""The same pair with an axis that its function sums away, made so long that counts leave float16."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref.verify.pair import Array, Pair, is_float
from mesp_ref.verify.tree import leaves

LONG = 65_600  # float16 ends at 65,504: what counts to here is infinite there
STEPS = 256, 1024, 4096  # lengths at which the time is taken first
MOST = 4 * LONG  # entries in all
DEAR = 0.03  # seconds that a forward and a backward may be expected to take at LONG


def lengthened(pair: Pair) -> Pair | None:
    """The pair with LONG entries along an axis, where its outputs keep their shape and calls stay cheap.

    Every array's axis of the same length goes along, where the forward takes that, else this one alone.
    All numbers of an array are its largest one: as many ties, and as many equal terms, as there can
    be. None where no axis is such: a function that keeps its axes is not asked.
    """
    arrays = {i: p for i, p in enumerate(pair.point) if isinstance(p, np.ndarray)}
    for leaf in pair.places:
        for axis, length in enumerate(arrays[leaf].shape):
            same = {i: tuple(np.flatnonzero(np.equal(p.shape, length))) for i, p in arrays.items()}
            alike = {i: axes for i, axes in same.items() if axes}
            alone = {leaf: (axis,)}
            for chosen in (alike, alone) if alike != alone else (alone,):
                found = _climbed(pair, chosen)
                if found is not None:
                    return found
    return None


def _climbed(pair: Pair, chosen: dict[int, tuple[int, ...]]) -> Pair | None:
    """The pair at LONG, by steps at which it is seen whether the next is affordable.

    A function that makes a square of its input grows out of the time long before out of memory.
    """
    before, last = 0.0, 0
    for length in (*STEPS, LONG):
        changed = {
            i: _stretched(pair.point[i], axes, length, i in pair.places)
            for i, axes in chosen.items()
        }
        if sum(a.size for a in changed.values()) * LONG / length > MOST:
            return None
        found = _made(pair.at(changed), pair.made)
        if found is None or length == LONG:
            return found
        taken = _seconds(found)
        if taken is None:
            return None
        growing = (taken - before) / (length - last) * LONG if last else 40 * taken
        if growing > DEAR:
            return None
        before, last = taken, length
    return None


def _stretched(p: Array, axes: tuple[int, ...], length: int, smooth: bool) -> Array:
    shape = tuple(length if a in axes else n for a, n in enumerate(p.shape))
    if not smooth:
        for a in axes:
            p = np.take(p, np.arange(length) % p.shape[a], a) if p.shape[a] else p
        return p
    finite = p[np.isfinite(p)]
    largest = finite[np.abs(finite).argmax()] if finite.size else p.dtype.type(1)
    return np.full(shape, largest, p.dtype)


def _made(pair: Pair, like: Any) -> Pair | None:
    """The pair with its outputs there, if they are finite and have the shapes of those given."""
    try:
        made = pair.forward(*pair.arguments())
        old, new = ([np.asarray(y) for _, y in leaves(v)] for v in (like, made))
        fits = [a.shape for a in old] == [b.shape for b in new]
        fits = fits and all(np.isfinite(y).all() for y in new if is_float(y))
    except Exception:  # it does not take that shape, as is its right
        return None
    return replace(pair, made=made) if fits else None


def _seconds(pair: Pair) -> float | None:
    """A forward and a backward take, or None where the backward does not know the shape."""
    dys = tuple(np.ones_like(y) for y in pair.floating())
    found = []
    for _ in range(2):
        start = time.perf_counter()
        try:
            pair.floating()
            pair.gradients(dys)
        except Exception:
            return None
        found.append(time.perf_counter() - start)
    return min(found)
