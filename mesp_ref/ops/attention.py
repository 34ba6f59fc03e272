"""Causal grouped-query attention."""

from typing import NamedTuple

from mesp_ref.ops._array import Array
from mesp_ref.ops.softmax import CausalSoftmaxRes, causal_softmax, causal_softmax_bwd


class AttentionRes(NamedTuple):
    """Residuals of attention. q, k and v are None once dropped: the block rebuilds them."""

    q: Array | None  # [N, Tq, H, D]
    k: Array | None  # [N, Tk, G, D]
    v: Array | None  # [N, Tk, G, D]
    p: Array  # [N, H, Tq, Tk]


def _stack_group(q: Array, groups: int) -> Array:
    """The H/G query heads that share a key/value head, stacked as rows: one GEMM serves them all.

    Shapes    [N, T, H, D] -> [N, G, (H/G)·T, D]; head h belongs to group h // (H/G)
    """
    n, t, heads, d = q.shape
    q = q.reshape(n, t, groups, heads // groups, d).transpose(0, 2, 3, 1, 4)
    return q.reshape(n, groups, -1, d)


def _unstack_group(o: Array, heads: int) -> Array:
    """The inverse of _stack_group: [N, G, (H/G)·T, D] -> [N, T, H, D]."""
    n, groups, _, d = o.shape
    o = o.reshape(n, groups, heads // groups, -1, d).transpose(0, 3, 1, 2, 4)
    return o.reshape(n, -1, heads, d)


def attention(
    q: Array, k: Array, v: Array, *, first: Array | None = None, scale: float | None = None
) -> tuple[Array, AttentionRes]:
    """Every query mixes the values of the keys at or before its position.

    Forward   p = causal_softmax(q·kᵀ·scale);  o = p·v, head by head; scale is 1/√D unless given
    Shapes    q [N, Tq, H, D]; k, v [N, Tk, G, D] with H a multiple of G -> o [N, Tq, H, D]
              Tk > Tq is a cache of earlier keys; first [N, Tq] or None (see causal_mask)
    Source    Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 for the shared key/value heads
    """
    (n, tq, heads, d), (_, tk, groups, _) = q.shape, k.shape
    scores = _stack_group(q, groups) @ k.transpose(0, 2, 3, 1)  # [N, G, (H/G)·Tq, Tk]
    scores *= scale or d**-0.5
    p, _ = causal_softmax(scores.reshape(n, heads, tq, tk), first=first)
    o = p.reshape(scores.shape) @ v.transpose(0, 2, 1, 3)  # [N, G, (H/G)·Tq, D]
    return _unstack_group(o, heads), AttentionRes(q, k, v, p)


def attention_bwd(
    do: Array, res: AttentionRes, *, scale: float | None = None
) -> tuple[Array, Array, Array]:
    """VJP of attention.

    Backward  dv = pᵀ·do;  dp = do·vᵀ;  ds = softmax_bwd(dp)·scale;  dq = ds·k;  dk = dsᵀ·q
              The rows of a group are stacked, so pᵀ·do and dsᵀ·q already sum over its query
              heads: that sum is the gradient of sharing a key/value head.
    Shapes    do [N, Tq, H, D] -> dq [N, Tq, H, D]; dk, dv [N, Tk, G, D]
    """
    q, k, v, p = res
    assert q is not None, "rebuild q, k and v first"
    assert k is not None
    assert v is not None
    heads, groups, d = q.shape[2], k.shape[2], q.shape[3]
    do = _stack_group(do, groups)  # [N, G, (H/G)·Tq, D]
    stacked = (*do.shape[:3], k.shape[1])  # [N, G, (H/G)·Tq, Tk]
    dv = p.reshape(stacked).swapaxes(2, 3) @ do  # [N, G, Tk, D]
    dp = do @ v.transpose(0, 2, 3, 1)
    ds = causal_softmax_bwd(dp.reshape(p.shape), CausalSoftmaxRes(p)).reshape(stacked)
    ds *= scale or d**-0.5
    dq = _unstack_group(ds @ k.transpose(0, 2, 1, 3), heads)
    dk = ds.swapaxes(2, 3) @ _stack_group(q, groups)  # [N, G, Tk, D]
    return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)
