"""Loss and accuracy of a batch, forward only, in less memory than any training step."""

import numpy as np

from mesp_ref import lean as tiled
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import EVERYTHING, block
from mesp_ref.engine.inputs import apart, check_batch
from mesp_ref.engine.model import NORM, Model, embed, shift
from mesp_ref.engine.positions import layers
from mesp_ref.lean.halves_tiled import TILED
from mesp_ref.ops import IGNORED, Array, rmsnorm, rows


def score(
    model: Model, adapter: Adapter | None, ids: Array, labels: Array, positions: Array | None = None
) -> tuple[float, int]:
    """Mean loss of a batch, and how many of its counted tokens are the model's first choice.

    The forward is that of mesp_tiled: halves of blocks, then the head a tile of the vocabulary at
    a time.
    Shapes    ids, labels [N,T], labels shifted inside
    Raises    MespRefError as mesp_ref.loss does
    """
    ids, targets = check_batch(model.config, ids, labels)
    x, y = embed(model, ids), shift(apart(targets, positions)).reshape(-1)
    for layer in layers(model, adapter, 0, ids.shape[1], positions):
        x = block(x, layer, halves=TILED, drop=EVERYTHING)[0]
    counted = np.flatnonzero(y != IGNORED)
    x = rows(x)[counted]
    n = rmsnorm(x, model.weights[NORM], eps=model.config.rms_norm_eps)[0]
    losses, first = _head(model, n, y[counted])
    return float(losses.sum()) / max(1, len(counted)), int(np.count_nonzero(first == y[counted]))


def _head(model: Model, n: Array, labels: Array) -> tuple[Array, Array]:
    """Loss of every row, and its likeliest token: running maximum and sum, as in tiled lm_loss.

    Shapes    n [M,C], labels [M] -> [M], [M]
    """
    w, m = model.weights[model.head], len(n)
    top = np.full(m, -np.inf, n.dtype)
    total, z_label, first = np.zeros(m, n.dtype), np.zeros(m, n.dtype), np.zeros(m, np.int64)
    for a, b in tiled.tiles(w.shape[0], tiled.vocabulary_tile(m)):
        z = n @ w[a:b].T
        here = np.flatnonzero((labels >= a) & (labels < b))
        z_label[here] = z[here, labels[here] - a]
        best = z.argmax(axis=1)
        high = z[np.arange(m), best]
        first = np.where(high > top, best + a, first)
        before, top = top, np.maximum(top, high)
        z -= top[:, None]
        total *= np.exp(before - top)
        total += np.exp(z, out=z).sum(axis=1)
    return np.log(total) + top - z_label, first
