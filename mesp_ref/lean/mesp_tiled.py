"""MeSP in tiles: no array of T·T, T·F or T·V elements; half a block is alive at a time."""

from mesp_ref.engine.block import ATTENTION_NORM, EVERYTHING, MLP_NORM
from mesp_ref.engine.half import SublayerRes, sublayer, sublayer_bwd
from mesp_ref.engine.methods import Step, embed_bwd, head_and_loss
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
        x, attention = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=EVERYTHING)
        if stack.halves:
            stack.push(x)
        x, mlp = sublayer(x, layer, MLP_NORM, halves.mlp, drop=EVERYTHING)
        kept.append((attention.inside, mlp.inside))
    del attention, mlp
    loss, dx, head = head_and_loss(step, x)
    for layer in reversed(step.layers):
        x, (in_attention, in_mlp) = stack.pop(), kept.pop()
        a = x
        if not stack.halves:
            a, _ = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=EVERYTHING)
        res = SublayerRes(x=a, inside=in_mlp)
        del a, in_mlp
        dx, grads = sublayer_bwd(dx, res, layer, MLP_NORM, halves.mlp_bwd, params=step.params)
        res = SublayerRes(x=stack.pop() if stack.halves else x, inside=in_attention)
        del x, in_attention
        dx, found = sublayer_bwd(
            dx, res, layer, ATTENTION_NORM, halves.attention_bwd, params=step.params
        )
        step.emit(layer.number, found | grads)
        del grads, found  # handed over
    embed_bwd(step, dx, head)
    return loss
