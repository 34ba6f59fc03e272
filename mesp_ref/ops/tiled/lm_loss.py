"""Language-model head and cross entropy in one pass over tiles of the vocabulary."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array, rows
from mesp_ref.ops.cross_entropy import IGNORED
from mesp_ref.ops.tiled._tiles import Matrix, matrix, tiles, view, vocabulary_tile, widest


class LmLossRes(NamedTuple):
    """Residuals of tiled lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    lse: Array  # [M], log Σ_v exp(z_v) of each of the M counted rows
    dx: Array  # [..., C], ∂loss/∂x


def lm_loss(
    x: Array, w: Matrix | Array, labels: Array, *, width: int | None = None
) -> tuple[Array, LmLossRes]:
    """Mean cross entropy of x·Wᵀ against the labels; logits exist one tile at a time.

    Forward   loss = mean over labels ≠ −100 of (log Σ_v exp(z_v) − z_label), z = x·Wᵀ
              ∂loss/∂x = (softmax(z)·W − W[label])/count on counted rows, 0 elsewhere
    Shapes    x [..., C], w [V, C] (tied: the embedding table), labels [...] -> loss []
    Tiles     `width` rows of W (vocabulary_tile), each used for the logits and at once for the gradient
    """
    w, labels_flat = matrix(w), labels.reshape(-1)
    counted = np.flatnonzero(labels_flat != IGNORED)
    dtype, mean = np.result_type(x, w.dtype), 1 / max(1, len(counted))
    dx = np.zeros(x.shape, dtype)
    width = width or vocabulary_tile(len(counted))
    lse, z_label = _one_pass(rows(x), w, counted, labels_flat[counted], width, rows(dx))
    dx *= mean
    return (lse - z_label).sum() * dtype.type(mean), LmLossRes(x, labels, lse, dx)


def _one_pass(
    x: Array, w: Matrix, counted: Array, labels: Array, width: int, dx: Array
) -> tuple[Array, Array]:
    """softmax(z)·W − W[label] into the counted rows of dx; returns lse and z_label, [M] each.

    Per tile  m′ = max(m, max z);  r = exp(m − m′);  p = exp(z − m′);
              total = r·total + Σ p;  mix = r·mix + p·W_tile;  at the end softmax·W = mix/total
    Source    Milakov & Gimelshein 2018 for the running maximum and sum
    """
    x, dtype = x[counted], dx.dtype
    logits, product = np.empty(len(x) * widest(w.shape[0], width), dtype), np.empty(x.shape, dtype)
    top = np.full(len(x), -np.inf, product.real.dtype)
    (total, z_label), mix = np.zeros((2, len(x)), dtype), np.zeros(x.shape, dtype)
    for a, b in tiles(w.shape[0], width):
        tile = w.rows(a, b)  # [b−a, C]
        z = np.matmul(x, tile.T, out=view(logits, len(x), b - a))
        here = np.flatnonzero((labels >= a) & (labels < b))
        z_label[here] = z[here, labels[here] - a]
        found = np.take(tile, labels[here] - a, axis=0, out=product[: len(here)], mode="clip")
        dx[counted[here]] = found  # W[label]; mode="raise" would copy once more
        before, top = top, np.maximum(top, z.real.max(axis=1))
        z -= top[:, None]
        np.exp(z, out=z)
        rescale = np.exp(before - top)
        total *= rescale
        total += z.sum(axis=1)
        mix *= rescale[:, None]
        mix += np.matmul(z, tile, out=product)
    mix /= total[:, None]
    np.take(dx, counted, axis=0, out=product, mode="clip")
    dx[counted] = np.subtract(mix, product, out=mix)
    return np.log(total) + top, z_label


def lm_loss_bwd(dloss: Array | float, res: LmLossRes, w: Matrix | Array) -> Array:
    """VJP of lm_loss in its activation: dx = dloss·∂loss/∂x.

    Shapes    dloss [] -> dx [..., C]
    """
    return np.multiply(res.dx, dloss, dtype=res.dx.dtype)


def lm_loss_bwd_params(
    dloss: Array | float, res: LmLossRes, w: Matrix | Array, *, width: int | None = None
) -> Array:
    """VJP of lm_loss in the head's weight; each tile of logits is rebuilt.

    Backward  dw[tile] = dloss·((softmax − onehot)[:, tile]/count)ᵀ·x, softmax = exp(z − lse)
    Shapes    dloss [] -> dw [V, C]
    """
    w, labels = matrix(w), res.labels.reshape(-1)
    counted = np.flatnonzero(labels != IGNORED)
    x, labels, dtype = rows(res.x)[counted], labels[counted], res.dx.dtype
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
