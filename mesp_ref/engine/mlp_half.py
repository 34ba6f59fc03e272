"""The MLP half of a block, between its norm and its sum: gate, up, SwiGLU, down_proj."""

from typing import Any

from mesp_ref import ops
from mesp_ref.engine.half import Gradients, Residuals, project, project_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.ops import NOTHING, Array


class MlpHalfRes(Residuals):
    """Residuals of mlp_half."""

    gate: Any = None  # [N, T, F]
    up: Any = None  # [N, T, F]
    silu: Any = None  # [N, T, F], gate ⊙ σ(gate); None once dropped: swiglu_bwd rebuilds it
    z: Any = None  # [N, T, F], input of down_proj; None once dropped: rebuilt from gate and up
    h: Gradients | None = None  # h = x·Aᵀ of each projection; None once dropped


def mlp_half(n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING) -> tuple[Array, MlpHalfRes]:
    """The gated MLP.

    Forward   z = silu(gate_proj(n)) ⊙ up_proj(n);  y = down_proj(z)
    Shapes    n [N, T, C] -> y [N, T, C]
    Drop      "gate", "up", "silu", "z", "h"
    """
    res = MlpHalfRes(h=None if "h" in drop else {})
    gate = project("mlp.gate_proj", n, layer, res.h)
    up = project("mlp.up_proj", n, layer, res.h)
    z, r = ops.swiglu(gate, up, drop=drop)
    if r.silu is not None:
        layer.show("mlp.swiglu.silu", r.silu)
    layer.show("mlp.swiglu", z)
    res.keep(drop, gate=gate, up=up, silu=r.silu, z=z)
    del gate, up, r  # what was dropped dies here
    return project("mlp.down_proj", z, layer, res.h), res


def mlp_half_bwd(
    dy: Array, n: Array, res: MlpHalfRes, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of mlp_half: dn, and its gradients by tensor name.

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
