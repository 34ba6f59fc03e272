"""Language-model head and cross entropy in one op, a few rows of logits at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import NOTHING, Array, rows
from mesp_ref.ops.cross_entropy import IGNORED, softmax_minus_onehot

ROWS = 64  # rows of logits that exist at once: 39 MB at V = 151,936 in float32


class LmLossRes(NamedTuple):
    """Residuals of lm_loss."""

    x: Array  # [..., C]
    labels: Array  # [...] integers
    dx: Array | None  # [..., C], ∂loss/∂x; None once dropped: the backward rebuilds it


def _chunks(x: Array, w: Array, labels: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Walk the counted rows: their indices, ∂loss/∂logits and losses, ROWS at a time.

    The logits live in one scratch buffer; each yield is valid until the next.
    """
    counted = np.flatnonzero(labels != IGNORED)
    scratch = np.empty((min(ROWS, len(counted)), len(w)), np.result_type(x, w))
    for start in range(0, len(counted), ROWS):
        chunk = counted[start : start + ROWS]
        logits = np.matmul(x[chunk], w.T, out=scratch[: len(chunk)])  # [ROWS, V]
        losses = softmax_minus_onehot(logits, labels[chunk])
        logits *= 1 / len(counted)
        yield chunk, logits, losses / len(counted)


def lm_loss(
    x: Array, w: Array, labels: Array, *, drop: frozenset[str] = NOTHING
) -> tuple[Array, LmLossRes]:
    """Mean cross entropy of x·Wᵀ against the labels, without ever holding all logits.

    Forward   logits = x·Wᵀ;  loss = mean over labels ≠ −100 of (log Σ_v exp(z_v) − z_label)
              The loss is a scalar, so while a chunk of logits exists its gradient is taken at
              once: what is kept is dx, not [M, V]. Rows with label −100 are never computed.
    Shapes    x [..., C], w [V, C] (tied: the embedding table), labels [...] -> loss []
    Drop      "dx"
    """
    x2, y = rows(x), labels.reshape(-1)
    loss = np.zeros((), np.result_type(x, w))
    dx = None if "dx" in drop else np.zeros_like(x2, dtype=loss.dtype)
    for chunk, dlogits, losses in _chunks(x2, w, y):
        loss += losses.sum()
        if dx is not None:
            dx[chunk] = dlogits @ w
    return loss, LmLossRes(x, labels, None if dx is None else dx.reshape(x.shape))


def lm_loss_bwd(dloss: Array | float, res: LmLossRes, w: Array) -> Array:
    """VJP of lm_loss in its activation.

    Backward  dx = dloss·((softmax − onehot)/count)·W on counted rows, exactly 0 elsewhere
    Shapes    dloss [] -> dx [..., C]
    """
    dx = lm_loss(res.x, w, res.labels)[1].dx if res.dx is None else res.dx
    assert dx is not None
    return np.multiply(dx, dloss, dtype=dx.dtype)


def lm_loss_bwd_params(dloss: Array | float, res: LmLossRes, w: Array) -> Array:
    """VJP of lm_loss in the head's weight; the logits are rebuilt chunk by chunk.

    Backward  dw = dloss·Σ_chunks ((softmax − onehot)/count)ᵀ·x
    Shapes    dloss [] -> dw [V, C]
    """
    x, labels = rows(res.x), res.labels.reshape(-1)
    dw = np.zeros(w.shape, np.result_type(x, w))
    for chunk, dlogits, _ in _chunks(x, w, labels):
        dw += dlogits.T @ x[chunk]
    dw *= dloss
    return dw
