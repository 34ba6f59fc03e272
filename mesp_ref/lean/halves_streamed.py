"""The two halves of a block for one chunk of rows, whose earlier keys and values are in a file.

The attention half writes its keys and values there, and reads those of all rows before it. Chunks run
forward in the order of the tokens and backward in reverse: no query sees a later key, so the gradients
of a chunk's keys and values are whole when the chunk's own queries have added theirs.

The MLP half is that of `tiled`: it is row by row.
"""

from typing import Any

from mesp_ref import lean
from mesp_ref.engine.attention_half import qkv, qkv_bwd
from mesp_ref.engine.block import Halves
from mesp_ref.engine.half import Gradients, project, project_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.lean.halves_tiled import tiled
from mesp_ref.lean.tiled_weight import in_tiles
from mesp_ref.ops import NOTHING, Array


def streamed(width: int | None = None) -> Halves:
    """The halves of a chunk; `layer.past` is its Earlier. `width` as in `tiled`."""
    return tiled(width=width)._replace(attention=attention_half, attention_bwd=attention_half_bwd)


def attention_half(n: Array, layer: Layer, *, drop: frozenset[str] = NOTHING) -> tuple[Array, None]:
    """o_proj(attention(n)) of a chunk that sees the chunks before it.

    Shapes    n [N, T, C] -> y [N, T, C]
    Keeps     keys, values, the attention output and log-sum-exp, in `layer.past`
    """
    past: Any = layer.past
    layer = in_tiles(layer)
    q, k, v = qkv(n, layer)
    k, v = past.extend(k, v)
    scale = layer.config.attention_scale
    o, res = lean.streamed_attention(q, k, v, first=layer.first, scale=scale)
    del q, k, v
    past.keep(o, res.lse)
    del res
    return project("self_attn.o_proj", o.reshape(*n.shape[:2], -1), layer), None


def attention_half_bwd(
    dy: Array, n: Array, res: None, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of attention_half: dn, and the chunk's share of the gradients by tensor name.

    Shapes    dy, n [N, T, C] -> dn [N, T, C]
    Rebuilds  q, and q and k before their norms
    """
    past: Any = layer.past
    layer = in_tiles(layer)
    k, v, o, lse = past.kept()
    flat = o.reshape(*n.shape[:2], -1)
    do, grads = project_bwd("self_attn.o_proj", dy, flat, layer, params=params)
    raw, scale = Gradients(), layer.config.attention_scale
    kept = lean.StreamedRes(qkv(n, layer, raw=raw)[0], k, v, o, lse, past.sums())
    dq, _, _ = lean.streamed_attention_bwd(
        do.reshape(o.shape), kept, first=layer.first, scale=scale
    )
    del do, kept, k, v, o, lse, flat
    dheads = [dq, *past.own()]
    del dq
    dn, found = qkv_bwd(dheads, n, layer, raw=raw, params=params)
    return dn, grads | found


STREAMED = streamed()
