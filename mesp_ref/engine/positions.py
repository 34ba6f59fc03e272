"""The blocks of a model, each with the angles of its positions and the keys that they see."""

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import SLIDING, Qwen2Config
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
    found = {}
    for kind in dict.fromkeys(kinds):
        cos, sin = angles(model, kind, start, stop)
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        found[kind] = cos, sin, first_keys(config, kind, start, stop, positions)
    return [Layer(i, config, model.weights, adapter, *found[k]) for i, k in enumerate(kinds)]


def angles(model: Model, kind: str, start: int, stop: int) -> tuple[Array, Array]:
    """Cosines and sines of positions start … stop−1 in layers of a kind."""
    theta, scaling = model.config.angles(kind)
    return rope_tables(start, stop, model.config.head_dim, theta, model.dtype, scaling)


def first_keys(
    config: Qwen2Config, kind: str, start: int, stop: int, positions: Array | None
) -> Array | None:
    """The first key that tokens start … stop−1 see, where their document or window begins: [N or 1, T].

    None where all see from 0
    """
    tokens, first = np.arange(start, stop)[None], None
    if positions is not None:
        first = tokens - positions
    if kind == SLIDING and config.sliding_window is not None:
        first = np.maximum(tokens - config.sliding_window + 1, 0 if first is None else first)
    return first
