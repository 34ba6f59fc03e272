"""A weight that is multiplied a tile at a time, so that no large one is ever decoded whole."""

import math
from typing import Any

import numpy as np

from mesp_ref.engine.layer import Layer
from mesp_ref.ops import Array, Table
from mesp_ref.ops._tiles import GROUP, tiles

LARGEST = 1 << 20  # elements of a weight that are decoded at once: 4 MB in float32
_LEAST = 2 * GROUP  # rows or columns; below it products get slow


class TiledWeight:
    """A weight that answers `w[...]` alone, with what exists in products and nowhere else.

    Forward   x·Wᵀ: columns a … b−1 of it from rows a … b−1 of W;  x·W: from columns a … b−1 of W.
              No sum is cut, so entries differ from those of one product by rounding in BLAS at most
    Shapes    table [out, in]; `rows` and `columns` of it at once
    """

    __array_ufunc__ = None  # NumPy leaves `x @ weight` to us

    def __init__(self, table: Table, rows: int, columns: int, turned: bool = False):
        self.table, self.shape, self.dtype = table, table.shape, table.dtype
        self._at_once, self._turned = (rows, columns), turned

    def __getitem__(self, index: Any) -> Any:
        assert index is ..., "attention's projections are multiplied whole"
        return self

    @property
    def T(self) -> "TiledWeight":
        """Wᵀ, to be multiplied and nothing else."""
        return TiledWeight(self.table, *self._at_once, turned=not self._turned)

    def __rmatmul__(self, x: Array) -> Array:
        """x·W, or x·Wᵀ of the transposed.  Shapes  x [M, out] -> [M, in], or [M, in] -> [M, out]"""
        axis = 0 if self._turned else 1
        y = np.empty((len(x), self.shape[axis]), np.result_type(x, self.dtype), like=x)
        for a, b in tiles(self.shape[axis], self._at_once[axis]):
            np.matmul(x, self._tile(a, b), out=y[:, a:b])
        return y

    def _tile(self, a: int, b: int) -> Array:
        return self.table[a:b].T if self._turned else self.table[:, a:b]


def in_tiles(layer: Layer) -> Layer:
    """The layer, in which attention's projections of more than LARGEST elements are tiled weights."""
    large = {}
    for letter in "qkvo":
        name = layer.name(f"self_attn.{letter}_proj.weight")
        w = layer.weights[name]
        if math.prod(w.shape) > LARGEST:
            out, into = w.shape
            large[name] = TiledWeight(w, _at_once(into), _at_once(out))
    if not large:
        return layer
    own = {name: w for name, w in layer.weights.items() if name.startswith(layer.name(""))}
    return layer._replace(weights=own | large)


def _at_once(length: int) -> int:
    """Rows or columns of that length to decode at once: whole groups of packed weights."""
    return max(_LEAST, LARGEST // length) // GROUP * GROUP
