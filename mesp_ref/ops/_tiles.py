"""What the tiled ops share: weights that come in tiles, and the bounds of tiles."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from mesp_ref.ops._array import Array

SCRATCH = 1 << 18  # elements of one tile array: 1 MB in float32
GROUP = 128  # the most columns that a packed weight decodes together


class Matrix(Protocol):
    """A weight [out, in] that hands out tiles in the compute dtype; each dies with its user."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def rows(self, a: int, b: int) -> Array: ...
    def cols(self, a: int, b: int) -> Array: ...


class Whole(NamedTuple):
    """A plain array as a Matrix; its tiles are views."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def rows(self, a: int, b: int) -> Array:
        return self.array[a:b]

    def cols(self, a: int, b: int) -> Array:
        return self.array[:, a:b]


def matrix(w: Matrix | Array) -> Matrix:
    """A weight as a Matrix."""
    return Whole(w) if isinstance(w, np.ndarray) else w


def tiles(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Bounds (a, b) of the fewest tiles no wider than `width`, even, or of whole groups if that fits."""
    count = -(-length // width)
    step = -(-length // max(1, count))
    grouped = -(-step // GROUP) * GROUP
    step = grouped if grouped <= width else step
    return ((a, min(a + step, length)) for a in range(0, length, max(1, step)))


def ranges(length: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """`parts` ranges (a, b) of whole units, as even as they can be."""
    edges = [round(length / unit * i / parts) * unit for i in range(parts)]
    return list(zip(edges, [*edges[1:], length], strict=True))


def widest(length: int, width: int) -> int:
    """Size of the largest tile: what scratch must hold."""
    return max((b - a for a, b in tiles(length, width)), default=0)


def view(scratch: Array, *shape: int) -> Array:
    """The beginning of a flat scratch array as a contiguous array of another shape."""
    size = 1
    for length in shape:
        size *= length  # np.prod takes 10 µs
    return scratch[:size].reshape(shape)


def fit(length: int, low: int, high: int) -> int:
    """How many columns of `length` elements fill one tile array, between `low` and `high`."""
    return max(low, min(high, SCRATCH // max(1, length)))


def mlp_width(rows: int, workers: int = 1) -> int:
    """Columns of the MLP at once: GEMMs get slow below 250 and no faster above 600.

    Workers that share the columns make do with 384 each: below that they hand the GIL over too often.
    """
    return fit(rows, 256, 640 if workers == 1 else 384) // GROUP * GROUP


def query_tile(share: int, keys: int) -> int:
    """Queries at once, whose scores stand in `share` rows each of up to `keys` columns."""
    return fit(share * keys, 16, 64)


def vocabulary_tile(rows: int, parts: int = 1) -> int:
    """Vocabulary entries at once; rows of 1024 logits, a power of two, would share cache sets.

    Parts of the vocabulary share what one would use, down to 256.
    """
    return max(256, fit(rows, 256, 1000) // parts)
