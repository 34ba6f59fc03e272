"""Qwen2 from blocks: embedding, blocks, final norm, head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import KeyValueStore, Tap, block, untapped
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.inputs import check_batch, check_ids, finite
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.weights import Weights
from mesp_ref.lean.halves_tiled import NamedMatrix
from mesp_ref.lean.workers import ALONE, Workers
from mesp_ref.ops import IGNORED, Array, embedding, linear, lm_loss, rmsnorm, rope_tables

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Model:
    """A Qwen2 model: its shape, where its weights come from, and its directory if it has one."""

    config: Qwen2Config
    weights: Weights
    path: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype: float32, float64 or complex128."""
        return self.weights.dtype

    @property
    def head(self) -> str:
        """Name of the head's weight: the embedding table itself when the two are tied."""
        return EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"


def head_matrix(model: Model) -> NamedMatrix:
    """The head's weight [V, C] as lm_loss takes it: one tile at a time."""
    return NamedMatrix(model.weights, model.head)


def shift(labels: Array) -> Array:
    """Labels moved one place left: position t predicts token t+1, the last position nothing.

    Shapes    labels [N, T] -> [N, T]
    """
    moved = np.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


def layers(
    model: Model, adapter: Adapter | None, start: int, stop: int, workers: Workers = ALONE
) -> list[Layer]:
    """The blocks of a model, with the angles of positions start … stop−1."""
    config = model.config
    cos, sin = rope_tables(start, stop, config.head_dim, config.rope_theta, model.dtype)
    return [
        Layer(i, config, model.weights, adapter, cos, sin, workers)
        for i in range(config.num_hidden_layers)
    ]


def embed(model: Model, ids: Array, tap: Tap = untapped) -> Array:
    """Token ids [N, T] to block input [N, T, C]."""
    x, _ = embedding(ids, model.weights.lazy(EMBEDDING))
    tap("model.embed_tokens", x)
    return x


def hidden_states(
    model: Model,
    ids: Array,
    adapter: Adapter | None = None,
    past: list[Any] | None = None,
    blocks: list[Layer] | None = None,
) -> Array:
    """What the head reads: the normalised output of the last block, [N, T, C].

    With `past`, one cache per block, the ids continue the sequence that the caches hold; `blocks` are
    those of `layers` where a step has them already.
    """
    start = past[0].length if past else 0
    blocks = blocks or layers(model, adapter, start, start + ids.shape[1])
    caches: list[KeyValueStore | None] = list(past) if past else [None] * len(blocks)
    x = [embed(model, ids)]
    for layer, cache in zip(blocks, caches, strict=True):
        x.append(block(x.pop(), layer, past=cache))  # nobody else holds a block's input
    return rmsnorm(x.pop(), model.weights(NORM), eps=model.config.rms_norm_eps)[0]


def logits(model: Model, input_ids: Any, adapter: Adapter | None = None) -> Array:
    """Scores of every next token.

    Forward   z = norm(blocks(embed(ids)))·Eᵀ, with E the embedding table (tied) or lm_head
    Shapes    input_ids [N, T] -> [N, T, V] in the model's dtype
    Raises    MespRefError for ids outside the vocabulary
    """
    ids = check_ids(model.config, input_ids)
    return linear(hidden_states(model, ids, adapter), model.weights(model.head))[0]


def loss(model: Model, adapter: Adapter | None, input_ids: Any, labels: Any) -> float:
    """Mean cross entropy of the next token over labels ≠ −100, forward only.

    Shapes    input_ids, labels [N, T]; labels are shifted inside, as in Hugging Face
    Raises    MespRefError as `logits` does, for labels of another shape, and for a loss that is not
              finite
    """
    ids, targets = check_batch(model.config, input_ids, labels)
    n = hidden_states(model, ids, adapter)
    value, _ = lm_loss(n, head_matrix(model), shift(targets), drop=frozenset({"dx"}))
    return finite("loss", value.item())
