"""The MLP half of a block: y = a + down_proj(silu(gate_proj(n)) ⊙ up_proj(n)), n = norm(a)."""

from typing import Any

from mesp_ref import ops
from mesp_ref.engine.half import (
    Backward,
    Forward,
    Gradients,
    HalfRes,
    Residuals,
    half,
    half_bwd,
    project,
    project_bwd,
)  # fmt: skip
from mesp_ref.engine.layer import Layer
from mesp_ref.ops import NOTHING, Array

_NORM = "post_attention_layernorm"


class MlpRes(Residuals):
    """Residuals of mlp."""

    gate: Any = None  # [N, T, F]
    up: Any = None  # [N, T, F]
    silu: Any = None  # [N, T, F], gate ⊙ σ(gate); None once dropped: swiglu_bwd rebuilds it
    z: Any = None  # [N, T, F], input of down_proj; None once dropped: rebuilt from gate and up
    h: Gradients | None = None  # h = x·Aᵀ of each projection; None once dropped


def mlp(n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING) -> tuple[Array, MlpRes]:
    """The gated MLP.

    Forward   z = silu(gate_proj(n)) ⊙ up_proj(n);  y = down_proj(z)
    Shapes    n [N, T, C] -> y [N, T, C]
    Drop      "gate", "up", "silu", "z", "h"
    """
    res = MlpRes(h=None if "h" in drop else {})
    gate = project("mlp.gate_proj", n, layer, res.h)
    up = project("mlp.up_proj", n, layer, res.h)
    z, r = ops.swiglu(gate, up, drop=drop)
    if r.silu is not None:
        layer.show("mlp.swiglu.silu", r.silu)
    layer.show("mlp.swiglu", z)
    res.keep(drop, gate=gate, up=up, silu=r.silu, z=z)
    del gate, up, r  # what was dropped dies here
    return project("mlp.down_proj", z, layer, res.h), res


def mlp_bwd(
    dy: Array, n: Array, res: MlpRes, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of mlp: dn, and its gradients by tensor name.

    Backward  dz = down_proj_bwd(dy);  dgate, dup = swiglu_bwd(dz);  dn = dn_gate + dn_up
    Shapes    dy, n [N, T, C] -> dn [N, T, C]
    """
    if res.z is None:
        res.z = ops.swiglu(res.gate, res.up, drop=frozenset({"silu"}))[0]
    dz, grads = project_bwd("mlp.down_proj", dy, res.take("z"), layer, res.h, params=params)
    layer.show("mlp.swiglu.grad", dz)
    r = ops.SwigluRes(res.take("gate"), res.take("up"), res.take("silu"))
    dgate, dup = ops.swiglu_bwd(dz, r)
    del dz, r
    dn, found = project_bwd("mlp.gate_proj", dgate, n, layer, res.h, params=params)
    del dgate
    dn_up, more = project_bwd("mlp.up_proj", dup, n, layer, res.h, params=params)
    dn += dn_up  # n feeds gate and up
    return dn, grads | found | more


def mlp_half(
    a: Array, layer: Layer, *, f: Forward = mlp, drop: frozenset[str] = NOTHING
) -> tuple[Array, HalfRes]:
    """y = a + mlp(norm(a)).  Shapes  a [N, T, C] -> y [N, T, C]"""
    return half(a, layer, _NORM, f, drop=drop)


def mlp_half_bwd(
    dy: Array, res: HalfRes, layer: Layer, *, f_bwd: Backward = mlp_bwd, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of mlp_half: da, and its gradients by tensor name.  Shapes  dy [N, T, C] -> da"""
    return half_bwd(dy, res, layer, _NORM, f_bwd, params=params)
