"""Language-model head and cross entropy in one pass over tiles of the vocabulary."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, Table, rows
from mesp_ref.ops._tiles import tiles, view, vocabulary_tile, widest
from mesp_ref.ops.cross_entropy import IGNORED


class LmLossRes(NamedTuple):
    """Residuals of lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    lse: Array  # [M], log Σ_v exp(z_v) of each of the M counted rows
    dx: Array | None  # [..., C], ∂loss/∂x; None once dropped: the backward rebuilds it


class Pass(NamedTuple):
    """What some rows v of W say of M rows of x."""

    top: Array  # [M], max_v z_v
    total: Array  # [M], Σ_v exp(z_v − top)
    z_label: Array  # [M], z of the label where it is among them, else 0
    mix: Array  # [M, C], Σ_v exp(z_v − top)·W_v; [0, 0] where no gradient is wanted


def lm_loss(
    x: Array, w: Table, labels: Array, *, width: int | None = None, drop: frozenset[str] = NOTHING
) -> tuple[Array, LmLossRes]:
    """Mean cross entropy of x·Wᵀ against the labels; logits exist one tile at a time.

    Forward   loss = mean over labels ≠ −100 of (log Σ_v exp(z_v) − z_label), z = x·Wᵀ
              ∂loss/∂x = (softmax(z)·W − W[label])/count on counted rows, 0 elsewhere
    Shapes    x [..., C], w [V, C] (tied: the embedding table), labels [...] -> loss []
    Tiles     `width` rows of W (vocabulary_tile), each used for the logits and at once for the gradient
    Drop      "dx"
    """
    flat, dtype = labels.reshape(-1), np.result_type(x, w.dtype)
    counted = np.flatnonzero(flat != IGNORED)
    x_counted = rows(x)[counted]
    chosen = None if "dx" in drop else np.zeros(x_counted.shape, dtype)  # W[label]
    width = width or vocabulary_tile(len(counted))
    found = one_pass(x_counted, w, flat[counted], chosen, width, (0, w.shape[0]))
    del x_counted  # before dx, which may be larger than a tile's logits were
    return loss_of(found, chosen, x, labels)


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
    logits = np.empty(len(x) * widest(stop - start, width), dtype)
    top = np.full(len(x), -np.inf, logits.real.dtype)
    total, z_label = np.zeros((2, len(x)), dtype)
    mix, product = np.zeros((2, *x.shape) if chosen is not None else (2, 0, 0), dtype)
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


def loss_of(found: Pass, chosen: Array | None, x: Array, labels: Array) -> tuple[Array, LmLossRes]:
    """The loss and its residuals from a pass over all of W, whose mix becomes the gradient."""
    (top, total, z_label, mix), dx = found, None
    counted = np.flatnonzero(labels.reshape(-1) != IGNORED)
    mean = total.dtype.type(1 / max(1, len(counted)))
    if chosen is not None:
        mix /= total[:, None]
        mix -= chosen
        mix *= mean
        dx = np.zeros(x.shape, total.dtype)
        rows(dx)[counted] = mix
    lse = np.log(total) + top
    return (lse - z_label).sum() * mean, LmLossRes(x, labels, lse, dx)


def lm_loss_bwd(
    dloss: Array | float, res: LmLossRes, w: Table, *, width: int | None = None
) -> Array:
    """VJP of lm_loss in its activation: dx = dloss·∂loss/∂x.

    Shapes    dloss [] -> dx [..., C]
    """
    dx = lm_loss(res.x, w, res.labels, width=width)[1].dx if res.dx is None else res.dx
    assert dx is not None
    return np.multiply(dx, dloss, dtype=dx.dtype)


def lm_loss_bwd_params(
    dloss: Array | float, res: LmLossRes, w: Table, *, width: int | None = None
) -> Array:
    """VJP of lm_loss in the head's weight; each tile of logits is rebuilt.

    Backward  dw[tile] = dloss·((softmax − onehot)[:, tile]/count)ᵀ·x, softmax = exp(z − lse)
    Shapes    dloss [] -> dw [V, C]
    """
    labels = res.labels.reshape(-1)
    counted = np.flatnonzero(labels != IGNORED)
    x, labels, dtype = rows(res.x)[counted], labels[counted], res.lse.dtype
    width = width or vocabulary_tile(len(x))
    dw, logits = np.empty(w.shape, dtype), np.empty(len(x) * widest(w.shape[0], width), dtype)
    for a, b in tiles(w.shape[0], width):
        z = np.matmul(x, w[a:b].T, out=view(logits, len(x), b - a))
        z -= res.lse[:, None]
        np.exp(z, out=z)
        here = np.flatnonzero((labels >= a) & (labels < b))
        z[here, labels[here] - a] -= 1
        dw[a:b] = z.T @ x
    dw *= dloss / max(1, len(x))
    return dw
