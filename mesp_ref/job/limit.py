"""A run within a memory limit: its method and checkpoints from the memory dial."""

import dataclasses

from mesp_ref.api import choose_schedule, step_shapes
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.lean.tiled_weight import tile_elements
from mesp_ref.memory import Base, Choice, Schedule, peak, seconds
from mesp_ref.train.trainer import TrainConfig


def within(
    limit: str | int,
    train: TrainConfig,
    model: Model,
    adapter: Adapter,
    schedule: Schedule | None = None,
    packed: bool = False,
) -> tuple[TrainConfig, Choice]:
    """The same run with the fastest method that keeps the limit, and why it is that one.

    The limit is on bytes above weights, LoRA parameters and optimiser state. Clipping and
    accumulation hold all LoRA gradients until the step's end, and that is counted. A run that goes
    on keeps its `schedule`, whatever room there is for files by now.

    Raises MespRefError for a malformed limit, and for one that no exact method keeps
    """
    choice = choose_schedule(
        model, adapter, (train.batch_size, train.seq_len), limit,
        hold_gradients=not train.per_block, workers=train.workers, name="--memory-limit",
        schedule=schedule, packed=packed,
    )  # fmt: skip
    method, checkpoints = choice.schedule
    if choice.file:
        shapes = step_shapes(model, adapter, train.batch_size, train.seq_len, train.workers)
        here = choice.schedule.shapes(shapes._replace(packed=packed))
        choice = choice._replace(seconds=seconds(method, here) * train.accumulate)
    return dataclasses.replace(train, method=method, checkpoints=checkpoints), choice


def sampling_need(tokens: int, model: Model, adapter: Adapter) -> int:
    """Bytes at most to continue a prompt up to `tokens` tokens in all, by a `tiled_model`.

    The forward over them, all keys and values, scores of the vocabulary, and the tile of a matrix that
    is decoded, where matrices are no views of their file.
    """
    shapes = step_shapes(model, adapter, 1, tokens)
    config, size = model.config, shapes.itemsize
    forward = peak("mezo", shapes._replace(base=Base(vectors=shapes.base.vectors))).total
    longest = max(
        config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    )
    most = tile_elements(longest)
    tile = max(
        shapes.decoded(store, most) + store.scratch(-(-most // longest), longest, size)
        for store in (shapes.base.matrices, shapes.base.head)
    )
    scores = 4 * config.vocab_size * size
    return forward + tile + scores + 2 * shapes.k * config.num_hidden_layers
