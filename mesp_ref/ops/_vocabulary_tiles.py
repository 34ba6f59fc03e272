"""The pass over tiles of the vocabulary in lm_loss."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array, Table
from mesp_ref.ops._tiles import tiles, view, widest


class Pass(NamedTuple):
    """What some rows v of W say of M rows of x."""

    top: Array  # [M], max_v z_v
    total: Array  # [M], Σ_v exp(z_v − top)
    z_label: Array  # [M], z of the label where it is among them, else 0
    mix: Array  # [M, C], Σ_v exp(z_v − top)·W_v; [0, 0] where no gradient is wanted


def one_pass(
    x: Array, w: Table, labels: Array, chosen: Array | None, width: int, bounds: tuple[int, int]
) -> Pass:
    """Rows a … b−1 of W, `bounds`, in tiles; with `chosen` the mix, and there W[label] of each row.

    Per tile  m′ = max(m, max z);  r = exp(m − m′);  p = exp(z − m′);
              total = r·total + Σ p;  mix = r·mix + p·W_tile
    Shapes    x [M, C], labels [M], chosen [M, C]
    Source    Milakov & Gimelshein 2018 for the running maximum and sum
    """
    (start, stop), dtype = bounds, np.result_type(x, w.dtype)
    logits = np.empty(len(x) * widest(stop - start, width), dtype, like=x)
    top = np.full(len(x), -np.inf, logits.real.dtype, like=x)
    total, z_label = np.zeros((2, len(x)), dtype, like=x)
    mix, product = np.zeros((2, *x.shape) if chosen is not None else (2, 0, 0), dtype, like=x)
    for a, b in tiles(stop - start, width):
        tile = w[start + a : start + b]  # [b−a, C]
        z = np.matmul(x, tile.T, out=view(logits, len(x), b - a))
        place = labels - (start + a)
        here = np.flatnonzero((place >= 0) & (place < b - a))
        z_label[here] = z[here, place[here]]
        before, top = top, np.maximum(top, z.real.max(axis=1))
        z -= top[:, None]
        np.exp(z, out=z)
        rescale = np.exp(before - top)
        total *= rescale
        total += z.sum(axis=1)
        if chosen is not None:
            mix *= rescale[:, None]
            mix += np.matmul(z, tile, out=product)
            found = np.take(tile, place[here], axis=0, out=product[: len(here)], mode="clip")
            chosen[here] = found  # mode="raise" would copy once more
        del tile  # decoded weights die before the next are decoded
    return Pass(top, total, z_label, mix)
