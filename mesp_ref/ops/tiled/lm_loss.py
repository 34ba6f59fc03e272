"""Language-model head and cross entropy in one pass over tiles of the vocabulary."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, rows
from mesp_ref.ops.cross_entropy import IGNORED
from mesp_ref.ops.tiled._tiles import Matrix, matrix, tiles, view, vocabulary_tile, widest


class LmLossRes(NamedTuple):
    """Residuals of tiled lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    lse: Array  # [M], log Σ_v exp(z_v) of each of the M counted rows
    dx: Array | None  # [..., C], ∂loss/∂x; None once dropped: the backward rebuilds it


def lm_loss(
    x: Array, w: Matrix | Array, labels: Array,
    *, width: int | None = None, drop: frozenset[str] = NOTHING,
) -> tuple[Array, LmLossRes]:  # fmt: skip
    """Mean cross entropy of x·Wᵀ against the labels; logits exist one tile at a time.

    Forward   loss = mean over labels ≠ −100 of (log Σ_v exp(z_v) − z_label), z = x·Wᵀ
              ∂loss/∂x = (softmax(z)·W − W[label])/count on counted rows, 0 elsewhere
    Shapes    x [..., C], w [V, C] (tied: the embedding table), labels [...] -> loss []
    Tiles     `width` rows of W (vocabulary_tile), each used for the logits and at once for the gradient
    Drop      "dx"
    """
    w, labels_flat = matrix(w), labels.reshape(-1)
    counted = np.flatnonzero(labels_flat != IGNORED)
    dtype, mean = np.result_type(x, w.dtype), 1 / max(1, len(counted))
    dx = None if "dx" in drop else np.zeros(x.shape, dtype)
    width = width or vocabulary_tile(len(counted))
    into = None if dx is None else rows(dx)
    lse, z_label = _one_pass(rows(x), w, counted, labels_flat[counted], width, dtype, into)
    if dx is not None:
        dx *= mean
    return (lse - z_label).sum() * dtype.type(mean), LmLossRes(x, labels, lse, dx)


def _one_pass(
    x: Array, w: Matrix, counted: Array, labels: Array, width: int, dtype: np.dtype,
    dx: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """softmax(z)·W − W[label] into the counted rows of dx, if given; returns lse and z_label, [M].

    Per tile  m′ = max(m, max z);  r = exp(m − m′);  p = exp(z − m′);
              total = r·total + Σ p;  mix = r·mix + p·W_tile;  at the end softmax·W = mix/total
    Source    Milakov & Gimelshein 2018 for the running maximum and sum
    """
    x, logits = x[counted], np.empty(len(counted) * widest(w.shape[0], width), dtype)
    top = np.full(len(x), -np.inf, logits.real.dtype)
    total, z_label = np.zeros((2, len(x)), dtype)
    mix, product = np.zeros((2, *x.shape) if dx is not None else (2, 0, 0), dtype)
    for a, b in tiles(w.shape[0], width):
        tile = w.rows(a, b)  # [b−a, C]
        z = np.matmul(x, tile.T, out=view(logits, len(x), b - a))
        here = np.flatnonzero((labels >= a) & (labels < b))
        z_label[here] = z[here, labels[here] - a]
        before, top = top, np.maximum(top, z.real.max(axis=1))
        z -= top[:, None]
        np.exp(z, out=z)
        rescale = np.exp(before - top)
        total *= rescale
        total += z.sum(axis=1)
        if dx is not None:
            mix *= rescale[:, None]
            mix += np.matmul(z, tile, out=product)
            found = np.take(tile, labels[here] - a, axis=0, out=product[: len(here)], mode="clip")
            dx[counted[here]] = found  # W[label]; mode="raise" would copy once more
        del tile  # decoded weights die before the next are decoded
    if dx is not None:
        mix /= total[:, None]
        np.take(dx, counted, axis=0, out=product, mode="clip")
        dx[counted] = np.subtract(mix, product, out=mix)
    return np.log(total) + top, z_label


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
