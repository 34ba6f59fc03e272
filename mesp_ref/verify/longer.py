"""The same pair with a longer axis: past the tiles of kernels, and past what float16 counts to."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref.verify.pair import Array, Pair, eps, is_float
from mesp_ref.verify.tree import leaves

PAST_TILES = 1030  # no tile of kernels divides it, and all are shorter
LONG = 65_600  # float16 ends at 65,504: what counts to here is infinite there
STEPS = 256, 1024, 4096  # lengths at which the time is taken on the way there
MOST = 4 * LONG  # entries in all
MANY = 2**16 + 2**12  # entries of one array that PAST_TILES or indices may make
CHEAP, DEAR = 5e-4, 0.03  # seconds of a forward and a backward, at PAST_TILES and at LONG
Axes = dict[int, tuple[int, ...]]


def past_tiles(pair: Pair) -> Iterator[Pair]:
    """The pair with PAST_TILES entries along each axis in turn, where it takes that and it is cheap.

    Numbers are the given ones again and again, each up to a sixteenth smaller; what is sorted, whole,
    or sums to 1 in rows, stays so. Indices into the axis spread over all of it; where there are such,
    the array is also made longer than 16 bits count.
    """
    rng = np.random.default_rng(0)
    for chosen in _groups(pair):
        leaf, axes = next(iter(chosen.items()))
        old = pair.point[leaf].shape[axes[0]]
        goals = [PAST_TILES]
        if any(_indexes(pair, i, old) for i in range(len(pair.point)) if i not in chosen):
            goals.append(2**16 // max(pair.point[leaf].size // old, 1) + 9)
        for goal in goals:
            found = _affordable(pair, chosen, old, goal, rng)
            if found is not None:
                yield found


def _affordable(
    pair: Pair, chosen: Axes, old: int, goal: int, rng: np.random.Generator
) -> Pair | None:
    """The pair with `goal` entries along the axes, tried at an eighth of it first."""
    sizes = [
        pair.point[i].size // old ** len(axes) * goal ** len(axes) for i, axes in chosen.items()
    ]
    if max(sizes) > MANY:
        return None
    found = None
    for length in (goal // 8, goal):
        longer = {i: _repeated(pair, i, axes, length, rng) for i, axes in chosen.items()}
        longer |= {
            i: np.where(p >= 0, p * (length // old) + length // old - 1, p).astype(p.dtype)
            for i, p in enumerate(pair.point)
            if i not in chosen and length >= old and _indexes(pair, i, old)
        }
        found = _made(pair.at(longer), None)
        if found is None or (_seconds(found) or 1.0) > CHEAP:
            return None
    return found


def _indexes(pair: Pair, leaf: int, length: int) -> bool:
    """Whole numbers that may be places along an axis of this length; −100 and its like aside."""
    p = pair.point[leaf]
    ids = isinstance(p, np.ndarray) and p.dtype.kind in "iu" and p.size > 0
    return bool(ids and 0 <= p.max() < length)


def many_ties(pair: Pair) -> Pair | None:
    """The pair with LONG entries along an axis, where its outputs keep their shape and calls stay cheap.

    All numbers of an array are its largest one: as many ties, and as many equal terms, as there can
    be. None where no axis is such: a function that keeps its axes is not asked.
    """
    shapes = [np.shape(y) for _, y in leaves(pair.made)]
    for chosen in _groups(pair):
        found = _climbed(pair, chosen, shapes)
        if found is not None:
            return found
    return None


def graded(pair: Pair) -> Pair:
    """That pair with numbers from half of theirs upwards instead of equal ones."""
    return pair.at({
        i: (pair.point[i] * np.linspace(0.5, 1, pair.point[i].size).reshape(pair.point[i].shape))
        for i in pair.places if pair.point[i].size >= LONG
    })  # fmt: skip


def _groups(pair: Pair) -> Iterator[Axes]:
    """Axes that may be one: every array's of the same length, and one array's alone."""
    arrays = {i: p for i, p in enumerate(pair.point) if isinstance(p, np.ndarray)}
    seen: list[Axes] = []
    for leaf in pair.places:
        for axis, length in enumerate(arrays[leaf].shape):
            alike = {i: _axes(p, length) for i, p in arrays.items() if length in p.shape}
            alone: Axes = {leaf: (axis,)}
            for chosen in (alike, alone):
                if length and chosen not in seen:
                    seen.append(chosen)
                    yield chosen


def _axes(p: Array, length: int) -> tuple[int, ...]:
    return tuple(a for a, n in enumerate(p.shape) if n == length)


def _repeated(
    pair: Pair, leaf: int, axes: tuple[int, ...], length: int, rng: np.random.Generator
) -> Array:
    """A leaf with as many entries along its axes."""
    p = pair.point[leaf]
    normed, whole, ordered = sums_to_one(p), bool((p == np.round(p)).all()), is_sorted(p)
    if ordered and not whole:
        at = np.linspace(0, p.size - 1, length)
        return np.interp(at, np.arange(p.size), p).astype(p.dtype)
    for a in axes:
        at = np.arange(length) % p.shape[a]
        p = np.take(p, np.sort(at) if ordered else at, a)
    if leaf not in pair.places or whole:
        return p
    p = (p * (1 - rng.random(p.shape) / 16)).astype(p.dtype)
    return (p / p.sum(axis=-1, keepdims=True)).astype(p.dtype) if normed else p


def is_sorted(p: Array) -> bool:
    """A vector that only rises or only falls: knots, boundaries."""
    return (
        p.ndim == 1
        and p.size > 1
        and p.dtype.kind in "fiu"
        and len(set(np.sign(np.diff(p)).tolist())) == 1
    )


def sums_to_one(p: Array) -> bool:
    """Rows of probabilities."""
    if not p.ndim or not p.size or p.dtype.kind != "f" or (p < 0).any():
        return False
    return p.shape[-1] > 1 and bool(
        np.allclose(p.sum(axis=-1), 1, 0, 8 * p.shape[-1] * eps(p.dtype))
    )


def _climbed(pair: Pair, chosen: Axes, shapes: list[Any]) -> Pair | None:
    """The pair at LONG, by steps at which it is seen whether the next is affordable.

    A function that makes a square of its input grows out of the time long before out of memory.
    """
    before, last = 0.0, 0
    for length in (*STEPS, LONG):
        sizes = [p.size // p.shape[axes[0]] * LONG for p, axes in
                 ((pair.point[i], axes) for i, axes in chosen.items())]  # fmt: skip
        if sum(sizes) > MOST or max(map(len, chosen.values())) > 1:
            return None
        alike = {i: _alike(pair, i, axes[0], length) for i, axes in chosen.items()}
        found = _made(pair.at(alike), shapes)
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


def _alike(pair: Pair, leaf: int, axis: int, length: int) -> Array:
    """A leaf of one number, which is its largest; what has no gradient is repeated."""
    p = pair.point[leaf]
    at = np.arange(length) % p.shape[axis]
    if leaf not in pair.places:
        return np.take(p, at, axis)
    finite = p[np.isfinite(p)]
    largest = finite[np.abs(finite).argmax()] if finite.size else p.dtype.type(1)
    return np.full(np.take(p, at, axis).shape, largest, p.dtype)


def _made(pair: Pair, shapes: list[Any] | None) -> Pair | None:
    """The pair with its outputs there, if they are finite and have these shapes, or any."""
    try:
        made = pair.forward(*pair.arguments())
        old, new = ([np.asarray(y) for _, y in leaves(v)] for v in (pair.made, made))
        fits = len(old) == len(new) and shapes in (None, [y.shape for y in new])
        fits = fits and all(np.isfinite(y).all() for y in new if is_float(y))
    except Exception:  # it does not take that shape, as is its right
        return None
    return replace(pair, made=made) if fits else None


def _seconds(pair: Pair) -> float | None:
    """What a forward and a backward take, or None where the backward does not know the shape."""
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
