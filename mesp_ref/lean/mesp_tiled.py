"""MeSP in tiles: no array of T·T, T·F or T·V elements; half a block is alive at a time."""

from typing import Any

from mesp_ref.engine.block import ATTENTION_NORM, EVERYTHING, MLP_NORM
from mesp_ref.engine.half import SublayerRes, sublayer, sublayer_bwd
from mesp_ref.engine.methods import Step, embed_bwd, head_and_loss
from mesp_ref.engine.model import embed
from mesp_ref.ops import Array

_BUT_Y = EVERYTHING - {"y"}


def mesp_tiled(step: Step) -> Array:
    """MeSP, half a block at a time, with the halves of `tiled`.

    Keeps     the input of each block, and on disk, where it costs no memory, of each half; in RAM
              the input of the second half is computed again. What the halves themselves keep ("offload":
              q, k, v, the attention output, gate and up, in a file) they need not compute again.
              What a norm after a half was given goes the same way: to disk, or is computed again
    """
    x, stack, halves, kept = embed(step.model, step.ids), step.checkpoints, step.halves, []
    drop = _BUT_Y if stack.halves else EVERYTHING
    for layer in step.layers:
        stack.push(x)
        x, attention = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=drop)
        if stack.halves:
            stack.push(x)
        x, mlp = sublayer(x, layer, MLP_NORM, halves.mlp, drop=drop)
        kept.append([_set_aside(res, stack) for res in (attention, mlp)])
        del attention, mlp
    loss, dx, head = head_and_loss(step, x)
    for layer in reversed(step.layers):
        x, (attention, mlp) = stack.pop(), kept.pop()
        mlp.x = x
        if not stack.halves:
            mlp.x, again = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=_BUT_Y)
            if again.y is not None:
                attention.y = again.take("y")
                mlp.y = sublayer(mlp.x, layer, MLP_NORM, halves.mlp, drop=_BUT_Y)[1].take("y")
        dx, grads = sublayer_bwd(dx, mlp, layer, MLP_NORM, halves.mlp_bwd, params=step.params)
        attention.x = stack.pop() if stack.halves else x
        del x, mlp
        dx, found = sublayer_bwd(
            dx, attention, layer, ATTENTION_NORM, halves.attention_bwd, params=step.params
        )
        step.emit(layer.number, found | grads)
        del grads, found, attention  # handed over
    embed_bwd(step, dx, head)
    return loss


def _set_aside(res: SublayerRes, stack: Any) -> SublayerRes:
    """Residuals without what memory would have to hold."""
    return SublayerRes(inside=res.inside, y=None if res.y is None else stack.keep(res.y))
