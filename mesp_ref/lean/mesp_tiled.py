"""MeSP in tiles: no array of T·T, T·F or T·V elements; half a block is alive at a time."""

from mesp_ref.engine.attention_half import attention_half, attention_half_bwd
from mesp_ref.engine.block import EVERYTHING
from mesp_ref.engine.half import HalfRes
from mesp_ref.engine.methods import Step, embed_bwd, head_and_loss
from mesp_ref.engine.mlp_half import mlp_half, mlp_half_bwd
from mesp_ref.engine.model import embed
from mesp_ref.ops import Array


def mesp_tiled(step: Step) -> Array:
    """MeSP, half a block at a time, with the halves of `tiled`.

    Keeps     the input of each block, and on disk, where it costs no memory, of each half; in RAM
              the input of the second half is computed again. What the halves themselves keep ("offload":
              q, k, v, the attention output, gate and up, in a file) they need not compute again
    """
    x, stack, halves, kept = embed(step.model, step.ids), step.checkpoints, step.halves, []
    for layer in step.layers:
        stack.push(x)
        x, attention = attention_half(x, layer, f=halves.attention, drop=EVERYTHING)
        if stack.halves:
            stack.push(x)
        x, mlp = mlp_half(x, layer, f=halves.mlp, drop=EVERYTHING)
        kept.append((attention.inside, mlp.inside))
    del attention, mlp
    loss, dx, head = head_and_loss(step, x)
    for layer in reversed(step.layers):
        x, (attention_kept, mlp_kept) = stack.pop(), kept.pop()
        a = x if stack.halves else attention_half(x, layer, f=halves.attention, drop=EVERYTHING)[0]
        res = HalfRes(x=a, inside=mlp_kept)
        del a, mlp_kept
        dx, grads = mlp_half_bwd(dx, res, layer, f_bwd=halves.mlp_bwd, params=step.params)
        res = HalfRes(x=stack.pop() if stack.halves else x, inside=attention_kept)
        del x, attention_kept
        dx, found = attention_half_bwd(
            dx, res, layer, f_bwd=halves.attention_bwd, params=step.params
        )
        step.emit(layer.number, found | grads)
        del grads, found  # handed over
    embed_bwd(step, dx, head)
    return loss
