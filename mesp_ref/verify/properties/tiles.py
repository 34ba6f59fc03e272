"""Tiles: they cover all once, in the fewest that their width and their scratch allow."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from mesp_ref.lean.widths import mlp_width, query_tile
from mesp_ref.ops._tiles import GROUP, SCRATCH, tiles, vocabulary_tile, widest
from mesp_ref.verify.properties.claim import exactly, holds
from mesp_ref.verify.result import Finding


@holds("tiled_mlp")
def tiles_cover(rng: np.random.Generator) -> Iterator[Finding]:
    """Tiles follow each other from 0 to the end, none wider than allowed and as few as can be."""
    lengths = [1, 2, 5, 7, 12, 300, 700, 1301, *map(int, rng.integers(1, 3000, 6))]
    for length, width in product(lengths, (1, 3, 7, 130, 384, 640, 5000)):
        bounds, claim = list(tiles(length, width)), f"{length} in tiles of {width}"
        sizes = [b - a for a, b in bounds]
        edges = [a for a, _ in bounds] == [0, *(b for _, b in bounds[:-1])]
        yield exactly("tiled_mlp", claim, edges and bounds[-1][1] == length, True)
        yield exactly("tiled_mlp", f"{claim}: the widest", max(sizes), widest(length, width))
        fits = min(sizes) > 0 and max(sizes) <= width and len(sizes) <= -(-length // width)
        yield exactly("tiled_mlp", f"{claim}: fit", fits, True)
        least = -(-length // -(-length // width))  # in groups, where they fit as well
        grouped = len(sizes) == 1 or sizes[0] % GROUP == 0 or -(-least // GROUP) * GROUP > width
        yield exactly("tiled_mlp", f"{claim}: groups", grouped, True)
    yield exactly("tiled_mlp", "the widest of none", widest(0, 5), 0)


def _widest_that_fits(
    name: str, length: int, width: int, low: int, high: int, unit: int
) -> Finding:
    """A width in its range: no narrower than scratch asks for, and no wider than it allows."""
    least = width == low or width * length <= SCRATCH
    most = width == high or (width + unit) * length > SCRATCH
    fits = low <= width <= high and least and most and width % unit == 0
    return exactly("tiled_mlp", f"{name} of {length}: {width}", fits, True)


@holds("tiled_mlp")
def widths_fill_scratch(rng: np.random.Generator) -> Iterator[Finding]:
    """Tiles are the widest, within their range, whose array does not outgrow its scratch."""
    rows = [1, 200, 500, 700, 1100, 2000, 10**5, 10**7, *map(int, rng.integers(1, 5000, 6))]
    for length in rows:
        for workers, high in ((1, 640), (2, 384), (3, 384)):
            width = mlp_width(length, workers)
            yield _widest_that_fits("MLP columns", length, width, 256, high, GROUP)
        whole = vocabulary_tile(length)
        yield _widest_that_fits("vocabulary", length, whole, 256, 1000, 1)
        shared = [vocabulary_tile(length, parts) for parts in (2, 3)]
        wanted = [max(256, whole // parts) for parts in (2, 3)]
        yield exactly("tiled_mlp", f"vocabulary shared, {length} rows", shared == wanted, True)
        for share in (1, 3, 14):
            width = query_tile(share, 5 * length)
            yield _widest_that_fits("queries", share * 5 * length, width, 16, 64, 1)
