"""One tile of the gated MLP: products with LoRA, the gate, and the way back through it.

Everything is written into scratch that the callers in mlp.py make once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from mesp_ref.ops._array import Array, Table, rows, sigmoids
from mesp_ref.ops._tiles import tiles, view, widest
from mesp_ref.ops.geglu import CUBE, FAR, TWICE

GateUp: TypeAlias = tuple[Array, Array]  # gate and up of one tile, [M, b−a] each
Keep: TypeAlias = Callable[[Array], Array]  # an array in scratch -> its like that outlasts it


class MlpRes(NamedTuple):
    """Residuals of mlp: its input; gate and up of each tile too where they were kept."""

    x: Array  # [..., C]
    kept: list[GateUp] | None = None


class MlpTile(NamedTuple):
    """Columns a … b−1 of the MLP in the backward; valid until the next tile."""

    a: int
    b: int
    wg: Array  # [b−a, C]
    wu: Array  # [b−a, C]
    z: Array  # [M, b−a], input of down_proj
    dgate: Array  # [M, b−a]
    dup: Array  # [M, b−a]
    spare: Array  # [M, C], scratch


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


def gelu(x: Array, a: Array, b: Array) -> None:
    """x <- x ⊙ σ(2u) with scratch a and b, 2u as in `_turn`."""
    _turn(x, a)
    np.minimum(a, 0, out=b)
    np.exp(np.subtract(b, a, out=a), out=a)
    np.exp(b, out=b)
    a += b
    x *= b
    x /= a


def _turn(x: Array, out: Array) -> None:
    """out = 2u of `geglu`: 2·√(2/π)·(x + 0.044715·x³)."""
    np.minimum(np.multiply(x, x, out=out), FAR, out=out)
    out *= CUBE
    out += 1
    out *= x
    out *= TWICE


def _slope(gate: Array, act: Array, slope: Array, sig: Array, other: Array, is_gelu: bool) -> None:
    """act <- silu or gelu of gate, slope <- its derivative, sig <- its σ; act may lie where gate does.

    slope = σ + act ⊙ (1 − σ), times 2u′ in gelu; 1 − σ(g) formed as σ(−g)
    """
    if is_gelu:
        _turn(gate, other)
        sigmoids(other, sig, slope, other)
        np.minimum(np.multiply(gate, gate, out=other), FAR, out=other)
        other *= 3 * CUBE * TWICE
        other += TWICE
        slope *= other
    else:
        sigmoids(gate, sig, slope, other)
    np.multiply(gate, sig, out=act)
    slope *= act
    slope += sig


def backward_tiles(
    dy: Array, res: MlpRes, wg: Table, wu: Table, wd: Table,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array,
    s: float, width: int, dtype: np.dtype, is_gelu: bool,
) -> Iterator[MlpTile]:  # fmt: skip
    """Rebuild z of each tile, and gate and up if need be; the gradient back through the gate.

    dz = dy·Wd + s·(dy·Bd)·Ad;  act = gate ⊙ σ;  z = act ⊙ up;  dup = act ⊙ dz;
    dgate = slope ⊙ up ⊙ dz, with the slope of `_slope`
    Scratch   five arrays of a tile: the three that it shows, in which gate and up lie before, and
              two in the `spare` that is its user's as long as the tile is shown
    """
    x = rows(res.x)
    (m, c), size = x.shape, len(x) * widest(wg.shape[0], width)
    scratch = np.empty((3, size), dtype, like=x)
    spare = np.empty(max(m * c, 2 * size), dtype, like=x)
    dhd = dy @ Bd * s  # [M, R]
    h = None if res.kept else (x @ Ag.T * s, x @ Au.T * s)
    for index, (a, b) in enumerate(tiles(wg.shape[0], width)):
        act, slope, z = (view(part, m, b - a) for part in scratch)
        dz, other = view(spare, 2, m, b - a)
        product(dy, wd[:, a:b], dhd, Ad[:, a:b], dz, other)
        gate, up = res.kept[index] if res.kept else (act, z)
        tile_g = wg[a:b]
        if h:
            product(x, tile_g.T, h[0], Bg[a:b].T, gate, other)
        _slope(gate, act, slope, z, other, is_gelu)
        tile_u = wu[a:b]
        if h:
            product(x, tile_u.T, h[1], Bu[a:b].T, up, other)
        slope *= up  # ∂z/∂gate; ∂z/∂up is act
        np.multiply(act, up, out=z)
        slope *= dz
        act *= dz
        yield MlpTile(a, b, tile_g, tile_u, z, dgate=slope, dup=act, spare=view(spare, m, c))
        del tile_g, tile_u  # decoded weights die before the next are decoded
