"""What the formulas of several exercises share."""

import numpy as np

from mesp_ref.ops import Array


def only(x: Array, axis: int, index: int) -> Array:
    """x where one place of an axis alone is not 0."""
    kept = np.zeros_like(x)
    np.moveaxis(kept, axis, 0)[index] = np.moveaxis(x, axis, 0)[index]
    return kept


def softmax(z: Array, axis: int = -1) -> Array:
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    shares: Array = e / e.sum(axis=axis, keepdims=True)
    return shares
