"""One transformer block: its two halves in order, then in reverse."""

from typing import NamedTuple

from mesp_ref.engine.attention_half import attention_half, attention_half_bwd
from mesp_ref.engine.half import (
    Backward,
    Forward,
    Gradients,
    Residuals,
    SublayerRes,
    sublayer,
    sublayer_bwd,
)  # fmt: skip
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.mlp_half import mlp_half, mlp_half_bwd
from mesp_ref.ops import NOTHING, Array

# What MeSP does not keep: h = x·Aᵀ of every LoRA layer, silu or gelu(gate), q, k, v, and z, the input of
# down_proj. Left are the paper's eight: block input, first norm, probabilities, attention output,
# the sum after attention, second norm, gate, up.
MESP = frozenset({"h", "silu", "gelu", "q", "k", "v", "z"})
# A forward that nothing follows, or whose block is run again, keeps none of the eight either.
EVERYTHING = MESP | {"x", "n", "y", "p", "o", "gate", "up"}

ATTENTION_NORM, MLP_NORM = 0, 1  # which of the family's norms: config.Traits


class Halves(NamedTuple):
    """How the two halves of a block are computed, forward and backward."""

    attention: Forward
    attention_bwd: Backward
    mlp: Forward
    mlp_bwd: Backward


PLAIN = Halves(attention_half, attention_half_bwd, mlp_half, mlp_half_bwd)


class BlockRes(Residuals):
    """Residuals of block: those of its halves."""

    attention: SublayerRes
    mlp: SublayerRes


def block(
    x: Array, layer: Layer, *, halves: Halves = PLAIN, drop: frozenset[str] = NOTHING
) -> tuple[Array, BlockRes]:
    """One pre-norm transformer block.

    Forward   a = x + attention_half(norm(x));  y = a + mlp_half(norm(a)); Gemma normalises what the
              halves give before it is added, too
    Shapes    x [N, T, C] -> y [N, T, C]
    Drop      residuals that the backward rebuilds (MESP), or all of them
    """
    a, attention = sublayer(x, layer, ATTENTION_NORM, halves.attention, drop=drop)
    del x
    layer.show("after_attention", a)
    y, mlp = sublayer(a, layer, MLP_NORM, halves.mlp, drop=drop)
    layer.tap(f"model.layers.{layer.number}", y)
    return y, BlockRes(attention=attention, mlp=mlp)


def block_bwd(
    dy: Array, res: BlockRes, layer: Layer, *, halves: Halves = PLAIN, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of block: dx, and the gradients of its LoRA matrices (with `params` of every weight).

    Backward  the halves in reverse
    Shapes    dy [N, T, C] -> dx [N, T, C]; gradients by tensor name
    Empties   `res`: each residual dies at its last use
    """
    layer.tap(f"model.layers.{layer.number}.grad", dy)
    da, grads = sublayer_bwd(dy, res.mlp, layer, MLP_NORM, halves.mlp_bwd, params=params)
    layer.show("after_attention.grad", da)
    attention, backward = res.attention, halves.attention_bwd
    dx, found = sublayer_bwd(da, attention, layer, ATTENTION_NORM, backward, params=params)
    return dx, grads | found
