"""The same pair at other points: what was kept from the first call shows, and so does another rank."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref.verify.behaviour import Grads, finding
from mesp_ref.verify.longer import is_sorted, sums_to_one
from mesp_ref.verify.pair import Array, Arrays, Pair, is_float
from mesp_ref.verify.result import Finding
from mesp_ref.verify.tree import leaves


def second_points(pair: Pair) -> Iterator[dict[int, Array]]:
    """Points in reach of any domain: the arrays turned round and 15/16 as large, then only smaller.

    Turning keeps every value, and a symmetric positive definite matrix one; sorted vectors stay
    sorted, whole numbers whole, probabilities such.
    """
    turned, smaller = {}, {}
    for i in pair.places:
        x = pair.point[i]
        kept = bool((x == np.round(x)).all()) or sums_to_one(x)
        smaller[i] = x if kept else (x * 0.9375).astype(x.dtype)
        flip = tuple(slice(None, None, -1) for _ in x.shape)
        turned[i] = smaller[i] if is_sorted(x) else smaller[i][flip].copy()
    yield turned
    yield smaller


def tall(pair: Pair) -> int:
    """The length that the first axes of outputs and arguments share, or 0."""
    made = [np.asarray(y) for _, y in leaves(pair.made)]
    return made[0].shape[0] if made and made[0].ndim and made[0].size else 0


def shorter(pair: Pair) -> Pair | None:
    """The pair with one row fewer, where its forward takes that; its `made` is that of the new point."""
    rows = tall(pair)
    if rows < 2:
        return None
    cut = {
        i: p[: rows - 1].copy()
        for i, p in enumerate(pair.point)
        if isinstance(p, np.ndarray) and p.ndim and p.shape[0] == rows
    }
    return _remade(pair, cut, lambda y: y[: rows - 1].shape)


def taller(pair: Pair) -> Pair | None:
    """The pair with an axis of length 1 in front, where its forward gives the same numbers then.

    None where the forward also returns indices: they mean places among the axes that were given.
    """
    if not all(is_float(np.asarray(y)) for _, y in leaves(pair.made)):
        return None
    ranks = [p.ndim for p in pair.point if isinstance(p, np.ndarray)]
    rows = tall(pair)
    groups: list[Any] = [
        lambda p: p.ndim == max(ranks),
        lambda p: p.ndim and rows and p.shape[0] == rows,
    ]
    for chosen in groups:
        lifted = {
            i: p[None].copy()
            for i, p in enumerate(pair.point)
            if isinstance(p, np.ndarray) and chosen(p)
        }
        found = _remade(pair, lifted, lambda y: (1, *y.shape))
        if found is not None and _same_numbers(found.made, pair.made):
            return found
    return None


def _same_numbers(a: Any, b: Any) -> bool:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(np.allclose(np.asarray(x)[0], y, 1e-9, 1e-9) for (_, x), (_, y) in pairs)


def _remade(pair: Pair, changed: dict[int, Array], shape: Any) -> Pair | None:
    """The pair at changed leaves if its forward runs there and every output has the shape expected."""
    if not any(i in pair.places for i in changed):
        return None
    moved = pair.at(changed)
    try:
        made = moved.forward(*moved.arguments())
        old, new = ([np.asarray(y) for _, y in leaves(v)] for v in (pair.made, made))
        fits = len(old) == len(new) and all(
            b.shape == shape(a) and b.dtype == a.dtype and (not is_float(b) or np.isfinite(b).all())
            for a, b in zip(old, new, strict=True)
        )
    except Exception:  # it does not take that shape, as is its right
        return None
    return replace(moved, made=made) if fits else None


def usable(pair: Pair, dys: Arrays) -> Grads | None:
    """The gradients at another shape, or None where the backward does not claim to know it."""
    try:
        grads = pair.gradients(dys)
    except Exception:  # promised for the shapes that were given only
        return None
    fits = all(
        g is None or (isinstance(g, np.ndarray) and g.shape == pair.point[i].shape)
        for i, g in grads.items()
    )
    return grads if fits else None


def same_again(pair: Pair, dys: Arrays, grads: Grads) -> Finding:
    """Back at the first point after calls at others: the first gradients must come again."""
    again = pair.gradients(dys)
    same = all(_near(g, again[i]) for i, g in grads.items())
    return finding("the same after other calls", same, "Something is kept from call to call.")


def _near(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    return bool(np.allclose(a, b, 0, 1e-6 * size, equal_nan=True))
