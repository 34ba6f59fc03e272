"""Rotary position embedding, half-split as in Qwen2 and Llama."""

from typing import NamedTuple

import numpy as np

from mesp_ref.ops._array import Array


class RopeRes(NamedTuple):
    """Residuals of rope: none. A rotation is linear and its tables are constants."""


class RopeScaling(NamedTuple):
    """How frequencies are slowed down for texts longer than those of pretraining."""

    factor: float
    original: int | None = None  # tokens of those texts; None: every frequency is slowed down
    low: float = 1.0  # turns in so many tokens, below which the whole factor holds
    high: float = 4.0  # and above which a frequency stays


def rope_tables(
    start: int, stop: int, head_dim: int, theta: float, dtype: np.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Cosines and sines of positions start … stop−1.

    Forward   angle[t, i] = t · f_i with f_i = theta^(−2i/D) for i < D/2, built in float64 and then
              rounded once: a table built in float32 drifts with the position
    Scaled    f/factor ("linear"); or ("llama3") kept·f + (1 − kept)·f/factor, where kept goes from 0
              to 1 as the turns within the original length, original·f/2π, go from low to high
    Shapes    -> cos, sin [stop−start, D/2] in the real type of `dtype`
    Source    Su et al. 2021, eq. 15; Llama 3.1 for the second scaling
    """
    real = np.empty(0, dtype).real.dtype
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [D/2]
    if scaling is not None:
        factor, original, low, high = scaling
        turns = 0 if original is None else original / (2 * np.pi) * frequency
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = kept * frequency + (1 - kept) * (frequency / factor)
    angle = np.arange(start, stop, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(real), np.sin(angle).astype(real)


def rope(x: Array, cos: Array, sin: Array) -> tuple[Array, RopeRes]:
    """Rotate pairs (x_i, x_{i+D/2}) of every head by the angle of its position.

    Forward   y₁ = x₁ ⊙ cos − x₂ ⊙ sin;  y₂ = x₂ ⊙ cos + x₁ ⊙ sin
              with x₁, x₂ the first and second *half* of the head (not even and odd elements)
    Shapes    x [N, T, H, D], cos, sin [T, D/2], or [N, T, D/2] where sequences have positions of their
              own -> y [N, T, H, D]
    Source    Su et al. 2021, eq. 34; pairing of the Hugging Face Llama and Qwen2 code
    """
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = cos[..., None, :], sin[..., None, :]  # [T, 1, D/2]
    y = np.empty(x.shape, x.dtype, like=x)
    y[..., :half] = x1 * cos - x2 * sin
    y[..., half:] = x2 * cos + x1 * sin
    return y, RopeRes()


def rope_bwd(dy: Array, res: RopeRes, cos: Array, sin: Array) -> Array:
    """VJP of rope: the inverse rotation.

    Backward  the transpose of a rotation by θ is the rotation by −θ: rope with −sin
    Shapes    dy [N, T, H, D] -> dx [N, T, H, D]
    """
    return rope(dy, cos, -sin)[0]
