"""Cross entropy over the vocabulary, with ignored rows."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array

IGNORED = -100  # the label of a row that does not count, as in Hugging Face and PyTorch


class CrossEntropyRes(NamedTuple):
    """Residuals of cross_entropy."""

    logits: Array  # [M, V]
    labels: Array  # [M] integers


def softmax_minus_onehot(logits: Array, labels: Array) -> Array:
    """Turn logits into softmax − onehot *in place* and return each row's loss.

    Forward   m = max(z);  loss = log Σ exp(z − m) − (z_label − m);  z <- softmax(z) − onehot
    Shapes    logits [M, V] (scratch, overwritten), labels [M] in [0, V) -> losses [M]
    """
    at_label = np.arange(len(labels)), labels
    logits -= logits.real.max(axis=1, keepdims=True)
    z_label = logits[at_label]
    np.exp(logits, out=logits)
    total = logits.sum(axis=1)
    logits /= total[:, None]
    logits[at_label] -= 1
    return np.log(total) - z_label


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, CrossEntropyRes]:
    """Mean negative log-likelihood of the rows whose label is not −100.

    Forward   loss = (1/count)·Σ_counted (log Σ_v exp(z_v) − z_label); 0 when no row counts
    Shapes    logits [M, V], labels [M] -> loss []
    """
    counted = labels != IGNORED
    losses = softmax_minus_onehot(logits[counted], labels[counted])
    loss = losses.sum() / max(1, len(losses))
    return loss, CrossEntropyRes(logits, labels)


def cross_entropy_bwd(dloss: Array | float, res: CrossEntropyRes) -> Array:
    """VJP of cross_entropy.

    Backward  dlogits = dloss·(softmax − onehot)/count on counted rows, exactly 0 elsewhere;
              softmax is rebuilt from the logits
    Shapes    dloss [] -> dlogits [M, V]
    """
    counted = res.labels != IGNORED
    rows = res.logits[counted]
    softmax_minus_onehot(rows, res.labels[counted])
    rows *= dloss / max(1, len(rows))
    dlogits = np.zeros_like(res.logits)
    dlogits[counted] = rows
    return dlogits
