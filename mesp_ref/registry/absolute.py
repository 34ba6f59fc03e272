"""How large the terms of a backward are: the yardstick of every rounding gate.

An error relative to max|g| says nothing where terms cancel: softmax at large logits, a confident
cross entropy, RMSNorm of one channel. So each op has its backward once more on absolute values,
`mag`: every term counted as if it could not cancel. A computed gradient lies within a small multiple
of u·mag of the true one, and where mag is 0 the gradient is exactly 0.

Softmax carries the rounding of its scores to first order: exp turns an absolute error of s into a
relative one of p, so mag_p = p·(1 + mag_s + Σ p·mag_s), with mag_s what the score was summed from.

Rules have the arguments of the backwards, `dy` itself a magnitude; the formulas stand in the ops'
docstrings. Here is what several of them share.
"""

import numpy as np

from mesp_ref.ops import Array


def rows(x: Array) -> Array:
    """|x| [..., C] as one matrix [M, C]."""
    return np.abs(x).reshape(-1, x.shape[-1])


def carried(p: Array, mag_s: Array) -> Array:
    """mag_p = p·(1 + mag_s + Σ p·mag_s) along the last axis."""
    return p * (1 + mag_s + (p * mag_s).sum(axis=-1, keepdims=True))


def sigmoid(x: Array) -> Array:
    """σ(x) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)
