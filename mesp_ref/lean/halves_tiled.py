"""The two halves of a block with tiled ops: each backward needs the half's input and nothing else.

    a = x + o_proj(attention(n))        n = norm(x)
    y = a + mlp(n)                      n = norm(a)

A backward rebuilds what it needs from n, so between halves only their inputs and one gradient are
alive; or it is given what the forward left with `keep`, and computes no projection again. The
outputs of o_proj and down_proj are not needed.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.attention_half import qkv, qkv_bwd
from mesp_ref.engine.block import PLAIN, Halves
from mesp_ref.engine.half import Gradients, project, project_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.lean.tiled_weight import in_tiles
from mesp_ref.ops import NOTHING, Array, Table

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def tiled(keep: lean.Keep | None = None, width: int | None = None) -> Halves:
    """The halves in tiles.

    keep      takes an array and returns its like that outlasts it: what the backward is then spared
    width     columns of the MLP at once, by default those of `mlp_width` for as many rows as come
    """
    return Halves(
        partial(attention_half, keep=keep), attention_half_bwd,
        partial(mlp_half, keep=keep, width=width), partial(mlp_half_bwd, width=width),
    )  # fmt: skip


class AttentionHalfRes(NamedTuple):
    """Residuals of attention_half: those of attention, and q and k before their norms."""

    attention: lean.AttentionRes
    raw: Gradients  # empty where a family has no such norms


def _attention(n: Array, layer: Layer, *, raw: Gradients | None = None) -> lean.AttentionRes:
    """Attention over its projections."""
    scale = layer.config.attention_scale
    return lean.attention(*qkv(n, layer, raw=raw), first=layer.first, scale=scale)[1]


def attention_half(
    n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING, keep: lean.Keep | None = None
) -> tuple[Array, AttentionHalfRes | None]:
    """o_proj(attention(n)), and with `keep` the residuals of attention.

    Shapes    n [N, T, C] -> y [N, T, C]
    """
    layer, raw = in_tiles(layer), Gradients() if keep else None
    res, kept = _attention(n, layer, raw=raw), None
    o = res.o.reshape(*n.shape[:2], -1)
    if keep and raw is not None:
        held = lean.AttentionRes(*map(keep, res))
        kept = AttentionHalfRes(held, {letter: keep(x) for letter, x in raw.items()})
    del res, raw
    return project("self_attn.o_proj", o, layer), kept


def attention_half_bwd(
    dy: Array, n: Array, kept: AttentionHalfRes | None, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of attention_half: dn, and its gradients by tensor name; without residuals all is rebuilt.

    Shapes    dy, n [N, T, C] -> dn [N, T, C]
    """
    layer, raw = in_tiles(layer), dict(kept.raw) if kept else Gradients()
    res = kept.attention if kept else _attention(n, layer, raw=raw)
    del kept
    o = res.o.reshape(*n.shape[:2], -1)
    do, grads = project_bwd("self_attn.o_proj", dy, o, layer, params=params)
    do, scale = do.reshape(res.q.shape), layer.config.attention_scale
    dheads = list(lean.attention_bwd(do, res, first=layer.first, scale=scale))
    del do, o, res
    dn, found = qkv_bwd(dheads, n, layer, raw=raw, params=params)
    return dn, grads | found


def _parameters(layer: Layer) -> list[Any]:
    """W of gate, up and down; then A and B of each, of rank 0 where there is no adapter."""
    weights: list[Table] = [layer.weight(part) for part in _MLP]
    matrices: list[Array] = []
    for part, w in zip(_MLP, weights, strict=True):
        nothing = np.empty((0, w.shape[1]), w.dtype), np.empty((w.shape[0], 0), w.dtype)
        matrices += layer.pair(part) or nothing
    return [*weights, *matrices]


def _options(layer: Layer, width: int | None) -> dict[str, Any]:
    return {"s": layer.scale, "is_gelu": layer.config.traits.gelu, "width": width}


def mlp_half(
    n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING, keep: lean.Keep | None = None,
    width: int | None = None,
) -> tuple[Array, Any]:  # fmt: skip
    """down_proj(silu(gate_proj(n)) ⊙ up_proj(n)), and with `keep` gate and up, tile by tile.

    Shapes    n [..., C] -> y [..., C]
    """
    options = _options(layer, width)
    y, res = lean.mlp(n, *_parameters(layer), **options, keep=keep)
    return y, res.kept


def mlp_half_bwd(
    dy: Array, n: Array, kept: Any, layer: Layer, *, params: bool = False, width: int | None = None
) -> tuple[Array, Gradients]:
    """VJP of mlp_half: dn, and its gradients by tensor name; z at least is rebuilt.

    Shapes    dy, n [..., C] -> dn [..., C]
    """
    parameters, res = _parameters(layer), lean.MlpRes(n, kept)
    options = _options(layer, width)
    dn, *found = lean.mlp_bwd(dy, res, *parameters, **options)
    names = [tensor_name(layer.name(part), matrix) for part in _MLP for matrix in "AB"]
    grads = {name: g for name, g in zip(names, found, strict=True) if g.size}
    if params:
        dws = lean.mlp_bwd_params(dy, res, *parameters, **options)
        grads |= {f"{layer.name(part)}.weight": dw for part, dw in zip(_MLP, dws, strict=True)}
    return dn, grads


TILED = tiled()
# For rows of several documents: attention in tiles, which forms next to no scores between documents, and
# keeps what it rebuilds probabilities from; the MLP is whole.
APART = PLAIN._replace(
    attention=partial(attention_half, keep=lambda array: array), attention_bwd=attention_half_bwd
)
