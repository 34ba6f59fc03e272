"""The MLP half of a block, between its norm and its sum: gate, up, what is between, down_proj."""

from typing import Any

from mesp_ref import ops
from mesp_ref.engine.half import Gradients, Residuals, project, project_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.ops import NOTHING, Array


class MlpHalfRes(Residuals):
    """Residuals of mlp_half."""

    gate: Any = None  # [N, T, F]
    up: Any = None  # [N, T, F]
    silu: Any = None  # [N, T, F], silu(gate), or gelu; None once dropped: swiglu_bwd rebuilds it
    z: Any = None  # [N, T, F], input of down_proj; None once dropped: rebuilt from gate and up
    h: Gradients | None = None  # h = x·Aᵀ of each projection; None once dropped


def _gate(layer: Layer) -> tuple[Any, Any, Any]:
    """What the family computes of gate and up: the op, its backward, their residuals."""
    if layer.config.traits.gelu:
        return ops.geglu, ops.geglu_bwd, ops.GegluRes
    return ops.swiglu, ops.swiglu_bwd, ops.SwigluRes


def mlp_half(n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING) -> tuple[Array, MlpHalfRes]:
    """The gated MLP.

    Forward   z = silu(gate_proj(n)) ⊙ up_proj(n), in Gemma gelu;  y = down_proj(z)
    Shapes    n [N, T, C] -> y [N, T, C]
    Drop      "gate", "up", "silu" and "gelu", "z", "h"
    """
    gated, _, _ = _gate(layer)
    res = MlpHalfRes(h=None if "h" in drop else {})
    gate = project("mlp.gate_proj", n, layer, res.h)
    up = project("mlp.up_proj", n, layer, res.h)
    z, r = gated(gate, up, drop=drop)
    _, _, activation = r
    if activation is not None:
        layer.show(f"mlp.{gated.__name__}.{r._fields[2]}", activation)
    layer.show(f"mlp.{gated.__name__}", z)
    res.keep(drop, gate=gate, up=up, silu=activation, z=z)
    del gate, up, r, activation  # what was dropped dies here
    return project("mlp.down_proj", z, layer, res.h), res


def mlp_half_bwd(
    dy: Array, n: Array, res: MlpHalfRes, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of mlp_half: dn, and its gradients by tensor name.

    Backward  dz = down_proj_bwd(dy);  dgate, dup = swiglu_bwd(dz);  dn = dn_gate + dn_up
    Shapes    dy, n [N, T, C] -> dn [N, T, C]
    """
    gated, gated_bwd, Res = _gate(layer)
    if res.z is None:
        res.z = gated(res.gate, res.up, drop=frozenset({"silu", "gelu"}))[0]
    dz, grads = project_bwd("mlp.down_proj", dy, res.take("z"), layer, res.h, params=params)
    layer.show(f"mlp.{gated.__name__}.grad", dz)
    r = Res(res.take("gate"), res.take("up"), res.take("silu"))
    dgate, dup = gated_bwd(dz, r)
    del dz, r
    dn, found = project_bwd("mlp.gate_proj", dgate, n, layer, res.h, params=params)
    del dgate
    dn_up, more = project_bwd("mlp.up_proj", dup, n, layer, res.h, params=params)
    dn += dn_up  # n feeds gate and up
    return dn, grads | found | more
