"""The blocks of a model, each with the angles of its positions and the keys that they see."""

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import SLIDING
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array, rope_tables


def layers(
    model: Model, adapter: Adapter | None, start: int, stop: int, positions: Array | None = None
) -> list[Layer]:
    """The blocks of a model, with the angles of positions start … stop−1.

    positions    [N, T], from 0 anew where a document begins in a row of several, which are kept apart
    """
    config = model.config
    kinds = [config.layer_type(i) for i in range(config.num_hidden_layers)]
    places = {kind: _places(model, kind, start, stop, positions) for kind in dict.fromkeys(kinds)}
    return [Layer(i, config, model.weights, adapter, *places[k]) for i, k in enumerate(kinds)]


def _places(
    model: Model, kind: str, start: int, stop: int, positions: Array | None
) -> tuple[Array, Array, Array | None]:
    """Cosines, sines and the first visible key of each position, in layers of a kind."""
    config, first = model.config, None
    theta, scaling = config.angles(kind)
    cos, sin = rope_tables(start, stop, config.head_dim, theta, model.dtype, scaling)
    if positions is not None:
        cos, sin, first = cos[positions], sin[positions], np.arange(stop - start) - positions
    if kind == SLIDING and config.sliding_window is not None:
        begins = np.arange(start, stop)[None] - config.sliding_window + 1
        first = np.maximum(begins, 0 if first is None else first)
    return cos, sin, first
