"""A weight that is multiplied a tile at a time, so that no large one is ever decoded whole."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array, Table
from mesp_ref.ops._tiles import GROUP, tiles

LARGEST = 1 << 20  # elements of a weight that are decoded at once: 4 MB in float32
_LEAST = 2 * GROUP  # rows or columns; below it products get slow


class TiledWeight:
    """A weight as a weight, whose whole, `w[...]`, exists in products alone.

    Forward   x·Wᵀ: columns a … b−1 of it from rows a … b−1 of W;  x·W: from columns a … b−1 of W.
              No sum is cut, so entries differ from those of one product by rounding in BLAS at most
    Shapes    table [out, in]; `rows` and `columns` of it at once
    """

    __array_ufunc__ = None  # NumPy leaves `x @ weight` to us

    def __init__(self, table: Table, rows: int, columns: int, turned: bool = False):
        self.table, self.shape, self.dtype = table, table.shape, table.dtype
        self._at_once, self._turned = (rows, columns), turned

    def __getitem__(self, index: Any) -> Any:
        return self if index is ... else self.table[index]

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
            large[name] = _tiled(w)
    if not large:
        return layer
    own = {name: w for name, w in layer.weights.items() if name.startswith(layer.name(""))}
    return layer._replace(weights=own | large)


def tiled_model(model: Model) -> Model:
    """The model, in which every matrix of more than LARGEST elements is a tiled weight if it would have
    to be decoded: what writes text multiplies all of them whole, the head of the vocabulary, too."""
    large = {
        name: _tiled(w) for name, w in model.weights.items()
        if len(w.shape) == 2 and math.prod(w.shape) > LARGEST and _is_decoded(w)
    }  # fmt: skip
    return replace(model, weights={**model.weights, **large}) if large else model


def tile_elements(*lengths: int) -> int:
    """The most elements of a matrix that a tiled model decodes at once; lengths of rows are given."""
    return max(LARGEST, _LEAST * max(lengths))


def _tiled(w: Table) -> TiledWeight:
    out, into = w.shape
    return TiledWeight(w, _at_once(into), _at_once(out))


def _at_once(length: int) -> int:
    """Rows or columns of that length to decode at once: whole groups of packed weights."""
    return max(_LEAST, LARGEST // length) // GROUP * GROUP


def _is_decoded(w: Table) -> bool:
    """Whether a part of a weight is an array of its own, and no view of memory or of a file."""
    if isinstance(w, np.ndarray):
        return False
    part = w[:1]
    while isinstance(part.base, np.ndarray):
        part = part.base
    return part.base is None
