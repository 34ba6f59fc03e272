"""Causal softmax over the last axis of attention scores."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array


class CausalSoftmaxRes(NamedTuple):
    """Residuals of causal_softmax."""

    p: Array  # [..., Tq, Tk]


def causal_mask(tq: int, tk: int, like: Array | None = None) -> Array:
    """True where query i may see key j: j ≤ i + (Tk − Tq), aligned at the bottom right.

    Shapes    -> [Tq, Tk] bool. With Tq = Tk this is the lower triangle; with a cache of earlier
              keys (Tk > Tq) the last query sees every key. An array of the kind of `like`
    """
    return np.tri(tq, tk, k=tk - tq, dtype=bool, like=like)


def causal_softmax(s: Array) -> tuple[Array, CausalSoftmaxRes]:
    """Softmax of each row over the keys it may see; exactly 0 elsewhere.

    Forward   p_ij = exp(s_ij − m_i) / Σ_{j visible} exp(s_ij − m_i);  m_i = max over visible j
    Shapes    s [..., Tq, Tk] -> p [..., Tq, Tk]
    """
    tq, tk = s.shape[-2:]
    p = np.where(causal_mask(tq, tk, like=s), s, s.dtype.type(-np.inf))
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
