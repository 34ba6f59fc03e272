"""One tile of the gated MLP: products with LoRA, the gate, and the way back through it.

Everything is written into scratch that the callers in mlp.py make once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array, sigmoids
from mesp_ref.ops.tiled._tiles import Matrix, tiles, view, widest


class MlpTile(NamedTuple):
    """Columns a … b−1 of the MLP in the backward; valid until the next tile."""

    a: int
    b: int
    wg: Array  # [b−a, C]
    wu: Array  # [b−a, C]
    z: Array  # [M, b−a], input of down_proj
    dgate: Array  # [M, b−a]
    dup: Array  # [M, b−a]


def product(x: Array, w: Array, h: Array, B: Array, out: Array, spare: Array) -> Array:
    """out = x·w + h·B, the second product by way of `spare`."""
    np.matmul(x, w, out=out)
    out += np.matmul(h, B, out=view(spare, *out.shape))
    return out


def silu(x: Array, a: Array, b: Array) -> None:
    """x <- x ⊙ σ(x) with scratch a and b: as in sigmoids, but x·a/(a+b) alone."""
    np.minimum(x, 0, out=a)
    np.exp(np.subtract(a, x, out=b), out=b)
    np.exp(a, out=a)
    b += a
    x *= a
    x /= b


def backward_tiles(
    dy: Array, x: Array, wg: Matrix, wu: Matrix, wd: Matrix,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array,
    s: float, width: int, dtype: np.dtype, spare: Array,
) -> Iterator[MlpTile]:  # fmt: skip
    """Rebuild gate, up and z of each tile and take the gradient back through the gate.

    silu = gate ⊙ σ;  dz = dy·Wd + s·(dy·Bd)·Ad;  dup = dz ⊙ silu;
    dgate = dz ⊙ up ⊙ (σ + silu ⊙ (1 − σ)), with 1 − σ(g) formed as σ(−g)
    """
    m = len(x)
    scratch = np.empty((5, m * widest(wg.shape[0], width)), dtype)
    hg, hu, dhd = x @ Ag.T * s, x @ Au.T * s, dy @ Bd * s  # [M, R]
    for a, b in tiles(wg.shape[0], width):
        gate, up, z, dz, slope = (view(part, m, b - a) for part in scratch)
        product(dy, wd.cols(a, b), dhd, Ad[:, a:b], dz, spare)
        product(x, (tile_g := wg.rows(a, b)).T, hg, Bg[a:b].T, gate, spare)
        product(x, (tile_u := wu.rows(a, b)).T, hu, Bu[a:b].T, up, spare)
        sigmoids(gate, z, slope, view(spare, *gate.shape))
        gate *= z  # silu
        slope *= gate
        slope += z  # silu′
        np.multiply(gate, up, out=z)
        gate *= dz  # dup
        up *= dz
        up *= slope  # dgate
        yield MlpTile(a, b, tile_g, tile_u, z, up, gate)
        del tile_g, tile_u  # decoded weights die before the next are decoded
