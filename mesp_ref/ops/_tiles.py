"""The bounds of tiles, and scratch that every tile uses again."""

from collections.abc import Iterator

from mesp_ref.ops._array import Array

SCRATCH = 1 << 18  # elements of one tile array: 1 MB in float32
GROUP = 128  # the most columns that a packed weight decodes together


def tiles(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Bounds (a, b) of the fewest tiles no wider than `width`, even, or of whole groups if that fits."""
    count = -(-length // width)
    step = -(-length // max(1, count))
    grouped = -(-step // GROUP) * GROUP
    step = grouped if grouped <= width else step
    return ((a, min(a + step, length)) for a in range(0, length, max(1, step)))


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


def vocabulary_tile(rows: int, parts: int = 1) -> int:
    """Vocabulary entries at once; rows of 1024 logits, a power of two, would share cache sets.

    Parts of the vocabulary share what one would use, down to 256.
    """
    return max(256, fit(rows, 256, 1000) // parts)
