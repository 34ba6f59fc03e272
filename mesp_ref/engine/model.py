"""A model from blocks: embedding, blocks, final norm, head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mesp_ref.engine.block import EVERYTHING, PLAIN, Halves, block
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.layer import Layer, Weights
from mesp_ref.ops import IGNORED, Array, embedding, rmsnorm

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Model:
    """A model: its shape, its weights by name, and its directory if it has one."""

    config: Qwen2Config
    weights: Weights
    path: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype: float32, float64 or complex128."""
        return self.weights[NORM].dtype

    @property
    def head(self) -> str:
        """Name of the head's weight: the embedding table itself when the two are tied."""
        return EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"


def shift(labels: Array) -> Array:
    """Labels moved one place left: position t predicts token t+1, the last position nothing.

    Shapes    labels [N, T] -> [N, T]
    """
    moved = np.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


def embed(model: Model, ids: Array) -> Array:
    """Token ids [N, T] to block input [N, T, C]."""
    x, _ = embedding(ids, model.weights[EMBEDDING])
    if model.config.traits.scaled_embedding:
        x *= model.config.hidden_size**0.5
    return x


def hidden_states(
    model: Model, ids: Array, blocks: Sequence[Layer], halves: Halves = PLAIN
) -> Array:
    """What the head reads: the normalised output of the last block, [N, T, C]."""
    x = [embed(model, ids)]
    for layer in blocks:  # nobody else holds a block's input
        x.append(block(x.pop(), layer, halves=halves, drop=EVERYTHING)[0])
    return rmsnorm(x.pop(), model.weights[NORM], eps=model.config.rms_norm_eps)[0]
