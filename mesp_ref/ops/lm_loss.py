"""Language-model head and cross entropy in one pass over tiles of the vocabulary."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, Table, rows
from mesp_ref.ops._tiles import tiles, view, vocabulary_tile, widest
from mesp_ref.ops._vocabulary_tiles import Pass, one_pass
from mesp_ref.ops.cross_entropy import IGNORED


class LmLossRes(NamedTuple):
    """Residuals of lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    lse: Array  # [M], log Σ_v exp(z_v) of each of the M counted rows
    dx: Array | None  # [..., C], ∂loss/∂x; None once dropped: the backward rebuilds it


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
    chosen = None if "dx" in drop else np.zeros(x_counted.shape, dtype, like=x)  # W[label]
    width = width or vocabulary_tile(len(counted))
    found = one_pass(x_counted, w, flat[counted], chosen, width, (0, w.shape[0]))
    del x_counted  # before dx, which may be larger than a tile's logits were
    return loss_of(found, chosen, x, labels)


def loss_of(found: Pass, chosen: Array | None, x: Array, labels: Array) -> tuple[Array, LmLossRes]:
    """The loss and its residuals from a pass over all of W, whose mix becomes the gradient."""
    (top, total, z_label, mix), dx = found, None
    counted = np.flatnonzero(labels.reshape(-1) != IGNORED)
    mean = total.dtype.type(1 / max(1, len(counted)))
    if chosen is not None:
        mix /= total[:, None]
        mix -= chosen
        mix *= mean
        dx = np.zeros(x.shape, total.dtype, like=x)
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
    dw = np.empty(w.shape, dtype, like=x)
    logits = np.empty(len(x) * widest(w.shape[0], width), dtype, like=x)
    for a, b in tiles(w.shape[0], width):
        z = np.matmul(x, w[a:b].T, out=view(logits, len(x), b - a))
        z -= res.lse[:, None]
        np.exp(z, out=z)
        here = np.flatnonzero((labels >= a) & (labels < b))
        z[here, labels[here] - a] -= 1
        dw[a:b] = z.T @ x
    dw *= dloss / max(1, len(x))
    return dw
