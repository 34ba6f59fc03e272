"""The two halves of a block with tiled ops: each backward needs the half's input and nothing else.

    a = x + o_proj(attention(norm(x)))          attention_half
    y = a + mlp(norm(a))                        mlp_half

A backward rebuilds what it needs from its input, so between halves only `x`, `a` and one gradient
are alive; or it is given what the forward left with `keep`, and computes no projection again.
The outputs of o_proj and down_proj are not needed.
Workers take a part of the heads each, then a part of the MLP's columns, or of its rows (parts.py).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean as tiled
from mesp_ref import ops
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.block import project, project_bwd, qkv
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.weights import Weights
from mesp_ref.lean.shards import Half, attention_cuts, combined, mlp_cuts, share_rows, total
from mesp_ref.lean.workers import Workers
from mesp_ref.ops import NOTHING, Array

_H = frozenset({"h"})  # what LoRA layers drop: h is rebuilt
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

Kept = list[Any] | None  # what each worker left for its backward


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


def _of_mlp(layer: Layer, rows: int) -> list[tuple[slice, Layer]]:
    """For each worker some rows with the whole layer, or all rows with some of its columns."""
    count = layer.workers.size
    if share_rows(rows, count):
        return [(slice(a, b), layer) for a, b in tiled.ranges(rows, count)]
    return [(slice(0, rows), part) for part in layer.parts(mlp_cuts)]


def _of_shares(shares: Sequence[tuple[slice, Layer]], found: Sequence[Half]) -> Half:
    """What the workers found of the MLP's backward: joined over columns, or over rows."""
    if shares[0][0] == shares[-1][0]:
        return combined(found)
    dx, grads = [dx for dx, _ in found], [grads for _, grads in found]
    return np.concatenate(dx), {name: total([g[name] for g in grads]) for name in grads[0]}


def _with_kept(parts: list[Any], kept: Kept) -> list[tuple[Any, Any]]:
    """Each worker's part of a half with what it left in the forward, if anything."""
    return list(zip(parts, kept or [None] * len(parts), strict=True))


def _attention(n: Array, layer: Layer) -> tuple[Array, tiled.AttentionRes]:
    """Attention over its projections, the output as the [N, T, H·D] that o_proj reads."""
    q, k, v = qkv(n, layer, lambda part, y, r: y, _H)
    o, res = tiled.attention(q, k, v)
    return o.reshape(*n.shape[:2], -1), res


def attention_half(x: Array, layer: Layer, keep: tiled.Keep | None = None) -> tuple[Array, Kept]:
    """a = x + o_proj(attention(norm(x))), and with `keep` the residuals of attention.

    Shapes    x [N, T, C] -> a [N, T, C]
    """
    n = _norm("input_layernorm", x, layer)

    def share(part: Layer) -> tuple[Array, Any]:
        o, res = _attention(n, part)
        kept = keep and tiled.AttentionRes(*map(keep, res))
        del res
        return project("self_attn.o_proj", o, part, _H)[0], kept

    found = layer.each(attention_cuts, share)
    return x + total([y for y, _ in found]), keep and [kept for _, kept in found]


def attention_half_bwd(
    da: Array, x: Array, layer: Layer, kept: Kept = None, *, params: bool = False
) -> Half:
    """VJP of attention_half from its input: dx, and its gradients by tensor name.

    Shapes    da, x [N, T, C] -> dx [N, T, C]
    """
    n, shares = _norm("input_layernorm", x, layer), _with_kept(layer.parts(attention_cuts), kept)
    dn, grads = combined(layer.workers.each(partial(_attention_bwd, da, n, params), shares))
    del n
    dx, norm = _norm_bwd("input_layernorm", dn, x, layer, params)
    return da + dx, grads | norm


def _attention_bwd(
    da: Array, n: Array, params: bool, share: tuple[Layer, tiled.AttentionRes | None]
) -> Half:
    """From the gradient of o_proj's output to that of the norm; without residuals all rebuilt."""
    layer, res = share
    res = res or _attention(n, layer)[1]
    r = ops.LoraLinearRes(res.o.reshape(*n.shape[:2], -1), None)
    do, grads = project_bwd("self_attn.o_proj", da, r, layer, params)
    heads = list(tiled.attention_bwd(do.reshape(res.q.shape), res))
    del do, r, res, share
    dn: Array | None = None
    for letter in "qkv":
        dy = heads.pop(0)
        if letter != "v":
            dy = ops.rope_bwd(dy, ops.RopeRes(), layer.cos, layer.sin)
        dy = dy.reshape(*n.shape[:2], -1)
        r = ops.LoraLinearRes(n, None)
        dx, found = project_bwd(f"self_attn.{letter}_proj", dy, r, layer, params)
        if dn is not None:
            dx += dn
        dn = dx
        del dx  # one sum beside what comes next
        grads |= found
    assert dn is not None
    return dn, grads


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


def _options(layer: Layer, rows: int) -> dict[str, Any]:
    """Scale and tile width of the MLP's ops."""
    scale = layer.adapter.scale if layer.adapter else 1.0
    return {"s": scale, "width": tiled.mlp_width(rows, layer.workers.size)}


def mlp_half(a: Array, layer: Layer, keep: tiled.Keep | None = None) -> tuple[Array, Kept]:
    """y = a + mlp(norm(a)), and with `keep` gate and up.  Shapes  a [N, T, C] -> y [N, T, C]"""
    n = ops.rows(_norm("post_attention_layernorm", a, layer))
    shares, options = _of_mlp(layer, len(n)), _options(layer, len(n))

    def share(rows_and_layer: tuple[slice, Layer]) -> tuple[Array, Any]:
        rows, part = rows_and_layer
        y, res = tiled.mlp(n[rows], *_mlp_parameters(part), **options, keep=keep)
        return y, res.kept

    found = layer.workers.each(share, shares)
    y = np.array(a, found[0][0].dtype)
    for (rows, _), (part, _) in zip(shares, found, strict=True):
        ops.rows(y)[rows] += part
    return y, keep and [kept for _, kept in found]


def mlp_half_bwd(
    dy: Array, a: Array, layer: Layer, kept: Kept = None, *, params: bool = False
) -> Half:
    """VJP of mlp_half from its input: da, and its gradients by tensor name.

    Shapes    dy, a [N, T, C] -> da [N, T, C]
    """
    n, dy2 = ops.rows(_norm("post_attention_layernorm", a, layer)), ops.rows(dy)
    parts, options = _of_mlp(layer, len(n)), _options(layer, len(n))
    shares = _with_kept(parts, kept)
    found = layer.workers.each(partial(_mlp_bwd, dy2, n, options, params), shares)
    dn, grads = _of_shares(parts, found)
    del n, found
    dx, norm = _norm_bwd("post_attention_layernorm", dn.reshape(a.shape), a, layer, params)
    return dy + dx, grads | norm


def _mlp_bwd(
    dy: Array, n: Array, options: dict[str, Any], params: bool,
    share: tuple[tuple[slice, Layer], Any],
) -> Half:  # fmt: skip
    """From the gradient of down_proj's output to that of the norm; z at least is rebuilt."""
    (rows, layer), kept = share
    parameters, res = _mlp_parameters(layer), tiled.MlpRes(n[rows], kept)
    dn, *found = tiled.mlp_bwd(dy[rows], res, *parameters, **options)
    names = [tensor_name(layer.name(part), matrix) for part in _MLP for matrix in "AB"]
    grads = {name: g for name, g in zip(names, found, strict=True) if g.size}
    if params:
        dws = tiled.mlp_bwd_params(dy[rows], res, *parameters, **options)
        grads |= zip((w.name for w in parameters[:3]), dws, strict=True)
    return dn, grads


def shared_loss(
    n: Array, w: NamedMatrix, labels: Array, workers: Workers, drop: frozenset[str] = NOTHING
) -> tuple[Array, ops.LmLossRes]:
    """lm_loss, of which workers take a part of the counted rows each, or of the vocabulary.

    Forward   loss = Σ_parts loss_part·count_part/count, and ∂loss/∂x alike
    Shapes    those of lm_loss: n [N, T, C], labels [N, T] -> loss []
    """
    x, flat = ops.rows(n), labels.reshape(-1)
    counted = np.flatnonzero(flat != ops.IGNORED)
    if workers.size == 1 or not share_rows(len(counted), workers.size):
        return ops.lm_loss(n, w, labels, drop=drop, parts=workers.size, each=workers.each)
    cuts = tiled.ranges(len(counted), workers.size)
    edges = [0, *(int(counted[a]) for a, _ in cuts[1:]), len(flat)]
    shares = [slice(a, b) for a, b in pairwise(edges)]
    found = workers.each(lambda rows: ops.lm_loss(x[rows], w, flat[rows], drop=drop), shares)
    loss, dtype = np.zeros((), found[0][0].dtype), found[0][0].dtype
    dx = None if "dx" in drop else np.empty(n.shape, dtype)
    for (part, res), (a, b), rows in zip(found, cuts, shares, strict=True):
        weight = dtype.type((b - a) / len(counted))
        loss = loss + part * weight
        if dx is not None and res.dx is not None:
            np.multiply(res.dx, weight, out=ops.rows(dx)[rows])
    lse = np.concatenate([res.lse for _, res in found])
    return loss, ops.LmLossRes(n, labels, lse, dx)
