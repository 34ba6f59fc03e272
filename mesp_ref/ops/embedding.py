"""Token embedding: a row lookup."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array, Table


class EmbeddingRes(NamedTuple):
    """Residuals of embedding."""

    ids: Array  # [...] integers


def embedding(ids: Array, w: Table) -> tuple[Array, EmbeddingRes]:
    """Row ids of the table.

    Forward   y[t] = w[ids[t]]
    Shapes    ids [...] integers in [0, V), w [V, C] -> y [..., C]
    """
    return w[ids], EmbeddingRes(ids)


def embedding_bwd_params(dy: Array, res: EmbeddingRes, w: Table) -> Array:
    """VJP of embedding in its table; token ids have no gradient.

    Backward  dw[v] = Σ_{t: ids[t] = v} dy[t]: repeated tokens accumulate
    Shapes    dy [..., C] -> dw [V, C]
    """
    dw = np.zeros(w.shape, dy.dtype, like=dy)
    np.add.at(dw, res.ids, dy)
    return dw
