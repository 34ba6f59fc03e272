"""One transformer block: its two halves in order, then in reverse."""

from typing import NamedTuple

from mesp_ref.engine.attention_half import (
    attention_half,
    attention_half_bwd,
    self_attn,
    self_attn_bwd,
)  # fmt: skip
from mesp_ref.engine.half import Backward, Forward, Gradients, HalfRes, Residuals
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.mlp_half import mlp, mlp_bwd, mlp_half, mlp_half_bwd
from mesp_ref.ops import NOTHING, Array

# What MeSP does not keep: h = x·Aᵀ of every LoRA layer, silu(gate), q, k, v, and z, the input of
# down_proj. Left are the paper's eight: block input, first norm, probabilities, attention output,
# the sum after attention, second norm, gate, up.
MESP = frozenset({"h", "silu", "q", "k", "v", "z"})
# A forward that nothing follows, or whose block is run again, keeps none of the eight either.
EVERYTHING = MESP | {"x", "n", "p", "o", "gate", "up"}


class Halves(NamedTuple):
    """How the two halves are computed: f of y = x + f(norm(x)), and its backward."""

    attention: Forward
    attention_bwd: Backward
    mlp: Forward
    mlp_bwd: Backward


PLAIN = Halves(self_attn, self_attn_bwd, mlp, mlp_bwd)


class BlockRes(Residuals):
    """Residuals of block: those of its halves."""

    attention: HalfRes
    mlp: HalfRes


def block(
    x: Array, layer: Layer, *, halves: Halves = PLAIN, drop: frozenset[str] = NOTHING
) -> tuple[Array, BlockRes]:
    """One pre-norm transformer block.

    Forward   a = x + self_attn(norm(x));  y = a + mlp(norm(a))
    Shapes    x [N, T, C] -> y [N, T, C]
    Drop      residuals that the backward rebuilds (MESP), or all of them
    """
    a, attention = attention_half(x, layer, f=halves.attention, drop=drop)
    del x
    y, mlp = mlp_half(a, layer, f=halves.mlp, drop=drop)
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
    da, grads = mlp_half_bwd(dy, res.mlp, layer, f_bwd=halves.mlp_bwd, params=params)
    dx, found = attention_half_bwd(
        da, res.attention, layer, f_bwd=halves.attention_bwd, params=params
    )
    return dx, grads | found
