"""Loss and accuracy of a batch, forward only, in less memory than a training step."""

import numpy as np

from mesp_ref import lean as tiled
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import EVERYTHING, block
from mesp_ref.engine.inputs import apart, check_batch
from mesp_ref.engine.model import NORM, Model, embed, shift
from mesp_ref.engine.positions import layers
from mesp_ref.lean.activations import open_checkpoints
from mesp_ref.lean.chunks import Earlier, Rooms, stream
from mesp_ref.lean.halves_streamed import STREAMED
from mesp_ref.lean.halves_tiled import TILED
from mesp_ref.ops import IGNORED, Array, rmsnorm
from mesp_ref.ops import rows as rows_of


def score(
    model: Model,
    adapter: Adapter | None,
    ids: Array,
    labels: Array,
    positions: Array | None = None,
    *,
    chunk: int | None = None,
) -> tuple[float, int]:
    """Mean loss of a batch, and how many of its counted tokens are the model's first choice.

    The forward is that of mesp_tiled: halves of blocks, then the head a tile of the vocabulary at
    a time; or with `chunk` that of mesp_streamed, so many rows at once and the rest in a file.
    Shapes    ids, labels [N,T], labels shifted inside
    Raises    MespRefError as mesp_ref.loss does
    """
    ids, targets = check_batch(model.config, ids, labels)
    if chunk is not None and ids.size > chunk:
        return _score_in_chunks(model, adapter, ids, targets, positions, chunk)
    x, y = embed(model, ids), shift(apart(targets, positions)).reshape(-1)
    for layer in layers(model, adapter, 0, ids.shape[1], positions):
        x = block(x, layer, halves=TILED, drop=EVERYTHING)[0]
    counted = np.flatnonzero(y != IGNORED)
    x = rows_of(x)[counted]
    n = rmsnorm(x, model.weights[NORM], eps=model.config.rms_norm_eps)[0]
    losses, first = _head(model, n, y[counted])
    return float(losses.sum()) / max(1, len(counted)), int(np.count_nonzero(first == y[counted]))


def _score_in_chunks(
    model: Model,
    adapter: Adapter | None,
    ids: Array,
    labels: Array,
    positions: Array | None,
    rows: int,
) -> tuple[float, int]:
    """`score` of more rows than one chunk: rows, and keys and values of one block, lie in a file."""
    with open_checkpoints("disk") as stack:
        walk = stream(model, adapter, labels, positions, stack, rows)
        x, kept = Rooms(stack, ids.shape), Rooms(stack, ids.shape)
        for at in walk.chunks:
            x.write("x", at, embed(model, ids[at]))
        for number in range(model.config.num_hidden_layers):
            for at in walk.chunks:
                here = walk.layer(number, at)._replace(past=Earlier(kept, kept, at))
                y = block(x.read("x", at), here, halves=STREAMED, drop=EVERYTHING)[0]
                x.write("x", at, y)
        loss, right, tokens = 0.0, 0, 0
        for at in walk.chunks:
            y = walk.labels(at).reshape(-1)
            counted = np.flatnonzero(y != IGNORED)
            n = rows_of(x.read("x", at))[counted]
            n = rmsnorm(n, model.weights[NORM], eps=model.config.rms_norm_eps)[0]
            losses, first = _head(model, n, y[counted])
            loss, tokens = loss + float(losses.sum()), tokens + len(counted)
            right += int(np.count_nonzero(first == y[counted]))
    return loss / max(1, tokens), right


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
