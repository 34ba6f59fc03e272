"""The same numbers in other memory: what a kernel breaks on that takes a pointer and trusts it."""

from collections.abc import Callable, Iterator

import numpy as np

from mesp_ref.verify.pair import Array


def strided(a: Array) -> Array:
    """Every second number of a larger array whose others are wild."""
    wide = np.full((*a.shape, 2), 1e3).astype(a.dtype)
    wide[..., 0] = a
    return wide[..., 0]


def transposed(a: Array) -> Array:
    """Columns first."""
    return a.copy("F") if a.ndim > 1 else strided(a)


def offset(a: Array) -> Array:
    """A dense array that begins in the middle of another."""
    wide = np.full(a.size + 3, 1e3).astype(a.dtype)
    wide[3:] = a.reshape(-1)
    return wide[3:].reshape(a.shape)


def reversed_(a: Array) -> Array:
    """Negative strides along every axis."""
    turned = tuple(slice(None, None, -1) for _ in a.shape)
    return a[turned].copy()[turned]


def frozen(a: Array) -> Array:
    """Read-only."""
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "non-contiguous": strided,
    "transposed": transposed,
    "offset": offset,
    "reversed": reversed_,
    "read-only": frozen,
}


def expanded(a: Array) -> Iterator[tuple[Array, Array]]:
    """Cotangents that are one row, or one number, repeated with stride 0; each beside a dense copy."""
    if a.size < 2:
        return
    views = [np.broadcast_to(a.reshape(-1)[:1].reshape([1] * a.ndim), a.shape)]
    if a.ndim > 1:
        views.append(np.broadcast_to(a[:1], a.shape))
        views.append(np.broadcast_to(a[..., :1], a.shape))
    for view in views:
        yield view, np.ascontiguousarray(view)
