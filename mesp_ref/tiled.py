"""The two halves of a block with tiled ops: each backward needs the half's input and nothing else.

    a = x + o_proj(attention(norm(x)))          attention_half
    y = a + mlp(norm(a))                        mlp_half

A backward rebuilds what it needs from its input, so between halves only `x`, `a` and one gradient
are alive. The outputs of o_proj and down_proj are not needed and not computed again.
"""

from typing import Any, NamedTuple

import numpy as np

from mesp_ref import ops
from mesp_ref.block import Layer, project, project_bwd, qkv
from mesp_ref.lora import tensor_name
from mesp_ref.ops import Array, tiled
from mesp_ref.weights import Weights

_H = frozenset({"h"})  # what LoRA layers drop: h is rebuilt
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class NamedMatrix(NamedTuple):
    """One tensor of a weight source as the Matrix of a tiled op."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape(self.name)

    @property
    def dtype(self) -> np.dtype:
        return self.weights.dtype

    def rows(self, a: int, b: int) -> Array:
        return self.weights.rows(self.name, a, b)

    def cols(self, a: int, b: int) -> Array:
        return self.weights.cols(self.name, a, b)


def _norm(part: str, x: Array, layer: Layer) -> Array:
    return ops.rmsnorm(x, layer.weight(part), eps=layer.config.rms_norm_eps)[0]


def _norm_bwd(
    part: str, dy: Array, x: Array, layer: Layer, params: bool
) -> tuple[Array, dict[str, Array]]:
    """Backward of a norm: dx, and with `params` the gradient of its weight."""
    r, w, eps = ops.RmsNormRes(x), layer.weight(part), layer.config.rms_norm_eps
    grads = {}
    if params:
        grads[f"{layer.name(part)}.weight"] = ops.rmsnorm_bwd_params(dy, r, w, eps=eps)
    return ops.rmsnorm_bwd(dy, r, w, eps=eps), grads


def _attention(n: Array, layer: Layer) -> tuple[Array, tiled.AttentionRes]:
    """Attention over its projections, the output as the [N, T, H·D] that o_proj reads."""
    q, k, v = qkv(n, layer, lambda part, y, r: y, _H)
    o, res = tiled.attention(q, k, v)
    return o.reshape(*n.shape[:2], -1), res


def attention_half(x: Array, layer: Layer) -> Array:
    """a = x + o_proj(attention(norm(x))).  Shapes  x [N, T, C] -> a [N, T, C]"""
    o = _attention(_norm("input_layernorm", x, layer), layer)[0]
    return x + project("self_attn.o_proj", o, layer, _H)[0]


def attention_half_bwd(
    da: Array, x: Array, layer: Layer, *, params: bool = False
) -> tuple[Array, dict[str, Array]]:
    """VJP of attention_half from its input: dx, and its gradients by tensor name.

    Shapes    da, x [N, T, C] -> dx [N, T, C]
    """
    n = _norm("input_layernorm", x, layer)
    o, res = _attention(n, layer)
    do, grads = project_bwd("self_attn.o_proj", da, ops.LoraLinearRes(o, None), layer, params)
    del o
    heads = list(tiled.attention_bwd(do.reshape(res.q.shape), res))
    del do, res
    dn = np.zeros_like(n)
    for letter in "qkv":
        dy = heads.pop(0)
        if letter != "v":
            dy = ops.rope_bwd(dy, ops.RopeRes(), layer.cos, layer.sin)
        dy = dy.reshape(*n.shape[:2], -1)
        r = ops.LoraLinearRes(n, None)
        dx, found = project_bwd(f"self_attn.{letter}_proj", dy, r, layer, params)
        dn += dx
        grads |= found
    del n, dy, dx, r
    dx, found = _norm_bwd("input_layernorm", dn, x, layer, params)
    return da + dx, grads | found


def _mlp_parameters(layer: Layer) -> list[Any]:
    """W of gate, up and down, then A and B of each: of rank 0 where there is no adapter."""
    weights: list[NamedMatrix] = []
    pairs: list[Array] = []
    for part in _MLP:
        w = NamedMatrix(layer.weights, f"{layer.name(part)}.weight")
        pair = layer.adapter and layer.adapter.pair(layer.name(part))
        weights.append(w)
        pairs += pair or (np.empty((0, w.shape[1]), w.dtype), np.empty((w.shape[0], 0), w.dtype))
    return [*weights, *pairs]


def _scale(layer: Layer) -> float:
    return layer.adapter.scale if layer.adapter else 1.0


def mlp_half(a: Array, layer: Layer) -> Array:
    """y = a + mlp(norm(a)).  Shapes  a [N, T, C] -> y [N, T, C]"""
    n = _norm("post_attention_layernorm", a, layer)
    return a + tiled.mlp(n, *_mlp_parameters(layer), s=_scale(layer))[0]


def mlp_half_bwd(
    dy: Array, a: Array, layer: Layer, *, params: bool = False
) -> tuple[Array, dict[str, Array]]:
    """VJP of mlp_half from its input: da, and its gradients by tensor name.

    Shapes    dy, a [N, T, C] -> da [N, T, C]
    """
    parameters = _mlp_parameters(layer)
    res = tiled.MlpRes(_norm("post_attention_layernorm", a, layer))
    dn, *found = tiled.mlp_bwd(dy, res, *parameters, s=_scale(layer))
    names = [tensor_name(layer.name(part), matrix) for part in _MLP for matrix in "AB"]
    grads = {name: g for name, g in zip(names, found, strict=True) if g.size}
    if params:
        dws = tiled.mlp_bwd_params(dy, res, *parameters, s=_scale(layer))
        grads |= zip((w.name for w in parameters[:3]), dws, strict=True)
    del res
    dx, norm = _norm_bwd("post_attention_layernorm", dn, a, layer, params)
    return dy + dx, grads | norm
