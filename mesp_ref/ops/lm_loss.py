"""Language-model head and cross entropy in one pass over tiles of the vocabulary."""

from functools import partial
from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, rows
from mesp_ref.ops._tiles import Matrix, matrix, ranges, tiles, view, vocabulary_tile, widest
from mesp_ref.ops._vocabulary_tiles import Each, in_turn, joined, one_pass
from mesp_ref.ops.cross_entropy import IGNORED


class LmLossRes(NamedTuple):
    """Residuals of tiled lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    lse: Array  # [M], log Σ_v exp(z_v) of each of the M counted rows
    dx: Array | None  # [..., C], ∂loss/∂x; None once dropped: the backward rebuilds it


def lm_loss(
    x: Array, w: Matrix | Array, labels: Array,
    *, width: int | None = None, drop: frozenset[str] = NOTHING, parts: int = 1, each: Each = in_turn,
) -> tuple[Array, LmLossRes]:  # fmt: skip
    """Mean cross entropy of x·Wᵀ against the labels; logits exist one tile at a time.

    Forward   loss = mean over labels ≠ −100 of (log Σ_v exp(z_v) − z_label), z = x·Wᵀ
              ∂loss/∂x = (softmax(z)·W − W[label])/count on counted rows, 0 elsewhere
    Shapes    x [..., C], w [V, C] (tied: the embedding table), labels [...] -> loss []
    Tiles     `width` rows of W (vocabulary_tile), each used for the logits and at once for the gradient
    Parts     of the vocabulary, with a pass over each, which `each(f, bounds)` may do all at once
    Drop      "dx"
    """
    w, labels_flat = matrix(w), labels.reshape(-1)
    counted = np.flatnonzero(labels_flat != IGNORED)
    dtype, mean, vocabulary = np.result_type(x, w.dtype), 1 / max(1, len(counted)), w.shape[0]
    width = width or vocabulary_tile(len(counted), parts)
    x_counted, dx = rows(x)[counted], None
    chosen = None if "dx" in drop else np.zeros(x_counted.shape, dtype)  # W[label]
    walk = partial(one_pass, x_counted, w, labels_flat[counted], width, dtype, chosen)
    top, total, z_label, mix = joined(each(walk, ranges(vocabulary, min(parts, vocabulary))))
    del walk, x_counted  # before dx, which may be larger than a tile's logits were
    if chosen is not None:
        mix /= total[:, None]
        mix -= chosen
        mix *= mean
        dx = np.zeros(x.shape, dtype)
        rows(dx)[counted] = mix
    lse = np.log(total) + top
    return (lse - z_label).sum() * dtype.type(mean), LmLossRes(x, labels, lse, dx)


def lm_loss_bwd(
    dloss: Array | float, res: LmLossRes, w: Matrix | Array, *, width: int | None = None
) -> Array:
    """VJP of lm_loss in its activation: dx = dloss·∂loss/∂x.

    Shapes    dloss [] -> dx [..., C]
    """
    dx = lm_loss(res.x, w, res.labels, width=width)[1].dx if res.dx is None else res.dx
    assert dx is not None
    return np.multiply(dx, dloss, dtype=dx.dtype)


def lm_loss_bwd_params(
    dloss: Array | float, res: LmLossRes, w: Matrix | Array, *, width: int | None = None
) -> Array:
    """VJP of lm_loss in the head's weight; each tile of logits is rebuilt.

    Backward  dw[tile] = dloss·((softmax − onehot)[:, tile]/count)ᵀ·x, softmax = exp(z − lse)
    Shapes    dloss [] -> dw [V, C]
    """
    w, labels = matrix(w), res.labels.reshape(-1)
    counted = np.flatnonzero(labels != IGNORED)
    x, labels, dtype = rows(res.x)[counted], labels[counted], res.lse.dtype
    width = width or vocabulary_tile(len(x))
    dw, logits = np.empty(w.shape, dtype), np.empty(len(x) * widest(w.shape[0], width), dtype)
    for a, b in tiles(w.shape[0], width):
        z = np.matmul(x, w.rows(a, b).T, out=view(logits, len(x), b - a))
        z -= res.lse[:, None]
        np.exp(z, out=z)
        here = np.flatnonzero((labels >= a) & (labels < b))
        z[here, labels[here] - a] -= 1
        dw[a:b] = z.T @ x
    dw *= dloss / max(1, len(x))
    return dw
