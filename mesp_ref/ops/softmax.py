"""Causal softmax over the last axis of attention scores."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array


class CausalSoftmaxRes(NamedTuple):
    """Residuals of causal_softmax."""

    p: Array  # [..., Tq, Tk]


def causal_mask(tq: int, tk: int, first: Array | None = None, like: Array | None = None) -> Array:
    """True where query i may see key j: j ≤ i + (Tk − Tq), aligned at the bottom right.

    Shapes    -> [Tq, Tk] bool. With Tq = Tk this is the lower triangle; with a cache of earlier
              keys (Tk > Tq) the last query sees every key. Of the kind of `like`.
    first     [N, Tq], the first key that each query may see, where its document begins in a row of
              several, or [1, Tq], where its window does: -> [N or 1, 1, Tq, Tk]
    """
    mask: Array = np.tri(tq, tk, k=tk - tq, dtype=bool, like=like)
    return mask if first is None else mask & (np.arange(tk, like=mask) >= first[:, None, :, None])


def causal_softmax(s: Array, *, first: Array | None = None) -> tuple[Array, CausalSoftmaxRes]:
    """Softmax of each row over the keys it may see; exactly 0 elsewhere.

    Forward   p_ij = exp(s_ij − m_i) / Σ_{j visible} exp(s_ij − m_i);  m_i = max over visible j
    Shapes    s [N, H, Tq, Tk], first [N, Tq] or None (see causal_mask) -> p [N, H, Tq, Tk]
    """
    p = np.where(causal_mask(s.shape[-2], s.shape[-1], first, s), s, s.dtype.type(-np.inf))
    p -= p.real.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p, CausalSoftmaxRes(p)


def causal_softmax_bwd(dp: Array, res: CausalSoftmaxRes) -> Array:
    """VJP of causal_softmax.

    Backward  ds = p ⊙ (dp − Σ_j dp_ij·p_ij), from ∂p_j/∂s_k = p_j·(δ_jk − p_k);
              masked entries have p = 0, so their gradient is exactly 0
    Shapes    dp [..., Tq, Tk] -> ds [..., Tq, Tk]
    """
    ds = dp - np.einsum("...k,...k->...", dp, res.p)[..., None]
    ds *= res.p
    return ds
