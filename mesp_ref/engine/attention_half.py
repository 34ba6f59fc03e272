"""The attention half of a block, between its norm and its sum: projections, RoPE, attention, o_proj."""

from typing import Any

from mesp_ref import ops
from mesp_ref.engine.half import Gradients, Residuals, norm, norm_bwd, project, project_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.ops import NOTHING, Array


class AttentionHalfRes(Residuals):
    """Residuals of attention_half. q, k and v come in RoPE's rotation, as attention reads them."""

    q: Any = None  # [N, T, H, D]; None once dropped, with k and v: rebuilt from n
    k: Any = None  # [N, T, G, D]
    v: Any = None  # [N, T, G, D]
    p: Any = None  # [N, H, T, T], probabilities
    o: Any = None  # [N, T, H·D], input of o_proj
    h: Gradients | None = None  # h = x·Aᵀ of each projection; None once dropped
    raw: Gradients | None = None  # q and k before their norms, where a family has them; goes with q


def qkv(
    n: Array, layer: Layer, h: Gradients | None = None, raw: Gradients | None = None
) -> list[Array]:
    """Queries and keys after RoPE, and values: [N, T, heads, D]. Forward and rebuild alike.

    Keeps     q and k before their norms in the dictionary `raw`
    """
    heads = []
    for letter in "qkv":
        y = project(f"self_attn.{letter}_proj", n, layer, h)
        y = y.reshape(*y.shape[:2], -1, layer.config.head_dim)
        if letter != "v":
            if layer.config.traits.head_norms:
                if raw is not None:
                    raw[letter] = y
                y = norm(f"self_attn.{letter}_norm", y, layer)
            y, _ = ops.rope(y, layer.cos, layer.sin)
            layer.show(f"self_attn.{letter}_rope", y)
        heads.append(y)
    return heads


def qkv_bwd(
    dheads: list[Array], n: Array, layer: Layer, h: Gradients | None = None,
    raw: Gradients | None = None, *, params: bool = False,
) -> tuple[Array, Gradients]:  # fmt: skip
    """VJP of qkv: dn = dn_q + dn_k + dn_v, because n feeds all three.

    Shapes    dheads dq, dk, dv [N, T, heads, D] -> dn [N, T, C]
    Empties   `dheads` and `raw`
    """
    dn, grads = None, Gradients()
    for letter in "qkv":
        dy = dheads.pop(0)
        if letter != "v":
            layer.show(f"self_attn.{letter}_rope.grad", dy)
            dy = ops.rope_bwd(dy, ops.RopeRes(), layer.cos, layer.sin)
        if raw and letter in raw:
            q = raw.pop(letter)
            dy, found = norm_bwd(f"self_attn.{letter}_norm", dy, q, layer, params=params)
            grads |= found
        dy = dy.reshape(*n.shape[:2], -1)
        dx, found = project_bwd(f"self_attn.{letter}_proj", dy, n, layer, h, params=params)
        if dn is not None:
            dx += dn
        dn = dx
        del dx  # one sum beside what comes next
        grads |= found
    assert dn is not None
    return dn, grads


def attention_half(
    n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING
) -> tuple[Array, AttentionHalfRes]:
    """Causal self-attention with its four projections.

    Forward   q, k, v = projections of n, q and k rotated;  o = attention(q, k, v);  y = o_proj(o)
    Shapes    n [N, T, C] -> y [N, T, C]
    Drop      "q", "k" and "v" together, "p", "o", "h"
    """
    res = AttentionHalfRes(h=None if "h" in drop else {}, raw=None if "q" in drop else {})
    q, k, v = qkv(n, layer, res.h, res.raw)
    if layer.past is not None:
        k, v = layer.past.extend(k, v)
    o, r = ops.attention(q, k, v, first=layer.first, scale=layer.config.attention_scale)
    layer.show("self_attn.attention.p", r.p)
    layer.show("self_attn.attention", o)
    o = o.reshape(*n.shape[:2], -1)
    res.keep(drop, q=q, k=k, v=v, p=r.p, o=o)
    del q, k, v, r  # what was dropped dies here
    return project("self_attn.o_proj", o, layer, res.h), res


def attention_half_bwd(
    dy: Array, n: Array, res: AttentionHalfRes, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of attention_half: dn, and its gradients by tensor name.

    Backward  do = o_proj_bwd(dy);  dq, dk, dv = attention_bwd(do);  dn as in qkv_bwd
    Shapes    dy, n [N, T, C] -> dn [N, T, C]
    """
    do, grads = project_bwd("self_attn.o_proj", dy, res.take("o"), layer, res.h, params=params)
    do = do.reshape(*n.shape[:2], -1, layer.config.head_dim)  # [N, T, H, D]
    layer.show("self_attn.attention.grad", do)
    if res.q is None:
        res.raw = {}
        res.q, res.k, res.v = qkv(n, layer, raw=res.raw)
    r = ops.AttentionRes(*(res.take(name) for name in "qkvp"))
    dheads = list(ops.attention_bwd(do, r, scale=layer.config.attention_scale))
    del do, r
    dn, found = qkv_bwd(dheads, n, layer, res.h, res.raw, params=params)
    return dn, grads | found
