"""Shapes: small ones, lengths around the tiles of kernels, products that overflow 16 bits."""

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

TILES = (16, 128, 768, 1024)  # a kernel's block sizes: pass your own as `tiles`
SMALL = 5
MOST = 2**17  # entries of everything the lengths of a shape can span
Shape = tuple[int, ...]


@st.composite
def _around_tiles(draw: st.DrawFn, axes: int, tiles: Sequence[int]) -> Shape:
    """One or two lengths next to a multiple of a tile, the others tiny."""
    lengths = [draw(st.integers(1, 3)) for _ in range(axes)]
    order = draw(st.permutations(range(axes)))
    for axis in order[: draw(st.integers(1, 2))]:
        tile = draw(st.sampled_from([*tiles, max(tiles), max(tiles)]))
        near = tile + draw(st.sampled_from([1, 0, -1, 6, tile // 2]))
        if math.prod(lengths) // lengths[axis] * near <= MOST:
            lengths[axis] = max(1, near)
    return tuple(lengths)


@st.composite
def _past_16_bits(draw: st.DrawFn, axes: int) -> Shape:
    """Two lengths, often the first, with a product just above 2¹⁵ or 2¹⁶, the others tiny; or 2,050.

    No length is longer: what a test makes of it may be as large as its square.
    """
    lengths = [draw(st.integers(1, 3)) for _ in range(axes)]
    first, *rest = draw(st.one_of(st.just(range(axes)), st.permutations(range(axes))))
    bits, spare = draw(st.sampled_from([2**16, 2**16, 2**15])), draw(st.integers(1, 9))
    if rest:
        lengths[rest[0]] = draw(st.sampled_from([32, 64, 129, 255]))
        lengths[first] = bits // lengths[rest[0]] + spare
    else:
        lengths[first] = 2050
    return tuple(lengths)


@st.composite
def shapes(draw: st.DrawFn, axes: int, largest: int = SMALL, tiles: Sequence[int] = TILES) -> Shape:
    """A shape of `axes` lengths; shrinks to all ones.

    Two thirds are of lengths from 1 to `largest`. The others have one or two lengths around a
    tile, or a product past 2¹⁵ or 2¹⁶; a `largest` other than the default, or tiles=(), means: only
    the small ones.
    """
    if largest == SMALL and tiles and axes:
        # Hypothesis draws low numbers most; by a hash of it each kind comes as often as is meant.
        number = draw(st.integers(0, 2**32 - 1))
        kind = int(np.random.default_rng(number).integers(16)) if number else 0
        if kind >= 11:
            return draw(_around_tiles(axes, tiles) if kind < 14 else _past_16_bits(axes))
    # Twice as many chances of each length but 1, which Hypothesis prefers by itself.
    return tuple((draw(st.integers(1, 2 * largest - 1)) + 2) // 2 for _ in range(axes))


def ranks(
    least: int = 1, most: int = 4, largest: int = SMALL, tiles: Sequence[int] = TILES
) -> st.SearchStrategy[Shape]:
    """Shapes of any rank from `least` to `most` axes."""
    return st.integers(least, most).flatmap(lambda axes: shapes(axes, largest, tiles))


@st.composite
def broadcastable(
    draw: st.DrawFn, arrays: int = 2, axes: int = 3, largest: int = 4
) -> tuple[Shape, ...]:
    """Shapes that broadcast against each other: axes of length 1, axes missing in front."""
    full = draw(st.tuples(*[st.integers(1, largest)] * draw(st.integers(1, axes))))
    found = []
    for _ in range(arrays):
        kept = [n if draw(st.booleans()) else 1 for n in full]
        found.append(tuple(kept[draw(st.integers(0, len(full))) :]))
    found[draw(st.integers(0, arrays - 1))] = full
    return tuple(found)
