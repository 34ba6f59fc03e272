"""Every method by name, and what one is given: the halves and the head that belong to it."""

from collections.abc import Callable
from functools import partial

from mesp_ref import ops
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import PLAIN
from mesp_ref.engine.half import Gradients
from mesp_ref.engine.inputs import apart
from mesp_ref.engine.methods import OnGradients, Step, mebp, mesp, store_all
from mesp_ref.engine.mezo import mezo
from mesp_ref.engine.model import EMBEDDING, Model
from mesp_ref.engine.positions import layers
from mesp_ref.lean import mlp_width
from mesp_ref.lean.activations import Checkpoints
from mesp_ref.lean.chunks import CHUNK, stream
from mesp_ref.lean.halves_streamed import streamed
from mesp_ref.lean.halves_tiled import APART, tiled
from mesp_ref.lean.mesp_streamed import mesp_streamed
from mesp_ref.lean.mesp_tiled import mesp_tiled
from mesp_ref.lean.shards import shared, shared_lm_loss
from mesp_ref.lean.workers import ALONE, Workers
from mesp_ref.ops import Array

METHODS: dict[str, Callable[[Step], Array]] = {
    method.__name__: method for method in (store_all, mebp, mesp, mesp_tiled, mesp_streamed, mezo)
}


def new_step(
    model: Model,
    adapter: Adapter | None,
    ids: Array,
    labels: Array,
    emit: OnGradients,
    *,
    params: bool,
    method: str = "store_all",
    stack: Checkpoints | None = None,
    workers: Workers = ALONE,
    positions: Array | None = None,
    chunk: int | None = None,
) -> Step:
    """A step of a checked batch [N, T], ready for a method: its halves and its head, shared or not.

    chunk     rows of mesp_streamed at once
    """
    lm_loss = ops.lm_loss if workers.size == 1 else partial(shared_lm_loss, workers)
    if method == "mesp_streamed":
        rows = min(chunk or CHUNK * workers.size, ids.size)
        halves = shared(streamed(mlp_width(rows, workers.size)), workers, rows=True)
        assert stack is not None
        walk = stream(model, adapter, labels, positions, stack, rows)
        blocks = layers(model, adapter, 0, 0)  # a chunk has angles of its own
        return Step(model, adapter, ids, labels, blocks, params, emit, walk, halves, lm_loss)
    labels = apart(labels, positions)
    if method == "mesp_tiled":
        keep = stack.keep if stack is not None and stack.offload else None
        halves = shared(tiled(keep, mlp_width(ids.size, workers.size)), workers, rows=True)
    else:
        halves = shared(PLAIN if positions is None else APART, workers)
    return Step(
        model, adapter, ids, labels, layers(model, adapter, 0, ids.shape[1], positions), params, emit,
        stack, halves, lm_loss,
    )  # fmt: skip


def by_block(named: Gradients, model: Model) -> dict[int, Gradients]:
    """Tensors by the number under which their gradients are handed over."""
    blocks: dict[int, Gradients] = {}
    for name, array in named.items():
        blocks.setdefault(_number(name, model), {})[name] = array
    return blocks


def _number(name: str, model: Model) -> int:
    """The block a tensor belongs to: −1 is the embedding, num_hidden_layers the norm and head."""
    if ".layers." in name:
        return int(name.split(".layers.")[1].split(".")[0])
    return -1 if name == EMBEDDING else model.config.num_hidden_layers
