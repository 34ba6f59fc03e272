"""MeSP in chunks of rows: as much memory for a million tokens as for a few hundred."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.engine.block import ATTENTION_NORM, EVERYTHING, MLP_NORM
from mesp_ref.engine.half import Gradients, SublayerRes, sublayer, sublayer_bwd
from mesp_ref.engine.methods import Step, embed_bwd
from mesp_ref.engine.model import NORM, embed
from mesp_ref.lean.chunks import Chunk, Earlier, Rooms, Stream, file_size
from mesp_ref.ops import IGNORED, Array

_ALL = slice(None), slice(None)
_BUT_Y = EVERYTHING - {"y"}


def mesp_streamed(step: Step) -> Array:
    """MeSP, a chunk of rows and half a block at a time, with the halves of `streamed`.

    Keeps     in the file, of every block: the input of each half and of a norm after it, keys, values,
              the attention output and log-sum-exp; one gradient of the rows, and of keys and values. In
              memory a chunk, and one block's gradients, which add over the chunks from last to first
    """
    stream: Stream = step.checkpoints
    stream.stack.need(file_size(step.model.config, step.ids.size, step.model.dtype.itemsize))
    blocks = [Rooms(stream.stack, step.ids.shape) for _ in step.layers]
    rows, sums = Rooms(stream.stack, step.ids.shape), Rooms(stream.stack, step.ids.shape)
    inside = _forward(step, stream, [*blocks, rows])
    loss, head = _head_and_loss(step, stream, rows)
    for layer in reversed(step.layers):
        kept, grads = blocks.pop(), Gradients()
        for number in reversed(range(len(stream.chunks))):
            rooms = kept, rows, sums
            grads = add(grads, _chunk_bwd(step, layer.number, number, inside[number], rooms))
        step.emit(layer.number, grads)
        del grads  # handed over
    embed_bwd(step, rows.read("x", _ALL), head)
    return loss


def add(sums: Gradients, found: Gradients) -> Gradients:
    """Sums of gradients, formed in those of the first chunk."""
    if not sums:
        return found
    for name in sums:
        sums[name] += found[name]
    return sums


def _forward(step: Step, stream: Stream, rooms: list[Rooms]) -> list[tuple[Any, Any]]:
    """All blocks, the input of each and of its second half in its rooms, the output in the last.

    Returns   what the halves left for each chunk, which is the same for all blocks: no array
    """
    inside: list[tuple[Any, Any]] = [(None, None)] * len(stream.chunks)
    for at in stream.chunks:
        rooms[0].write("x", at, embed(step.model, step.ids[at]))
    for layer in step.layers:
        block, after = rooms[layer.number : layer.number + 2]
        for number, at in enumerate(stream.chunks):
            here = stream.layer(layer.number, at)._replace(past=Earlier(block, block, at))
            x, halves = block.read("x", at), step.halves
            a, attention = sublayer(x, here, ATTENTION_NORM, halves.attention, drop=_BUT_Y)
            block.write("a", at, a)
            del a
            _set_aside(block, "attention", at, attention)
            x = block.read("a", at)
            y, mlp = sublayer(x, here, MLP_NORM, halves.mlp, drop=_BUT_Y)
            after.write("x", at, y)
            del x, y
            _set_aside(block, "mlp", at, mlp)
            inside[number] = attention.inside, mlp.inside
    return inside


def _set_aside(block: Rooms, half: str, at: Chunk, res: SublayerRes) -> None:
    """What a norm after a half was given, where a family has one, to the file."""
    y = res.take("y")
    if y is not None:
        block.write(half, at, y)


def _chunk_bwd(
    step: Step, block: int, number: int, inside: tuple[Any, Any], rooms: tuple[Rooms, Rooms, Rooms]
) -> Gradients:
    """A chunk's share of a block's gradients; that of its rows takes the place of the one it had."""
    stream: Stream = step.checkpoints
    (kept, rows, sums), at = rooms, stream.chunks[number]
    here, halves = stream.layer(block, at)._replace(past=Earlier(kept, sums, at)), step.halves
    res = SublayerRes(x=kept.read("a", at), inside=inside[1], y=kept.find("mlp", at))
    dy = rows.read("x", at)
    da, grads = sublayer_bwd(dy, res, here, MLP_NORM, halves.mlp_bwd, params=step.params)
    rows.write("x", at, da)
    del da
    res = SublayerRes(x=kept.read("x", at), inside=inside[0], y=kept.find("attention", at))
    dy = rows.read("x", at)
    dx, found = sublayer_bwd(
        dy, res, here, ATTENTION_NORM, halves.attention_bwd, params=step.params
    )
    rows.write("x", at, dx)
    return found | grads


def _head_and_loss(step: Step, stream: Stream, rows: Rooms) -> tuple[Array, Array | None]:
    """Final norm, head and loss of every chunk, weighted by its counted rows: the loss, and the tied
    table's gradient. The gradient of the rows takes their place; the rest as head_and_loss has it."""
    model, dtype = step.model, step.model.dtype
    w, w_norm, eps = model.weights[model.head], model.weights[NORM], model.config.rms_norm_eps
    counted = sum(_counted(stream, at) for at in stream.chunks)
    loss, grads = dtype.type(0), Gradients()
    for at in stream.chunks:
        weight = _counted(stream, at) / max(1, counted)
        n, r_norm = ops.rmsnorm(rows.read("x", at), w_norm, eps=eps)
        part, r_loss = step.lm_loss(n, w, stream.labels(at))
        del n
        loss = loss + part * dtype.type(weight)
        dn = ops.lm_loss_bwd(weight, r_loss, w)
        if step.params:
            dw = ops.lm_loss_bwd_params(weight, r_loss, w)
            dw_norm = ops.rmsnorm_bwd_params(dn, r_norm, w_norm, eps=eps)
            grads = add(grads, {NORM: dw_norm, model.head: dw})
        del r_loss
        rows.write("x", at, ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps))
        del dn, r_norm
    tied = grads.pop(model.head, None) if model.config.tie_word_embeddings else None
    if step.params:
        step.emit(model.config.num_hidden_layers, grads)
    return loss, tied


def _counted(stream: Stream, at: Chunk) -> int:
    return int(np.count_nonzero(stream.labels(at) != IGNORED))
