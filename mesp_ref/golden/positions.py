"""RoPE from positions: the angles that a backend computes itself, with theta and scaling.

    f_i = theta^(−2i/D) for i < D/2;  angle = position·f_i
    linear   f_i/factor
    llama3   f_i where the wavelength 2π/f_i is below original/high; f_i/factor where it is above
             original/low; between them (1 − s)·f_i/factor + s·f_i,
             s = (original·f_i/2π − low)/(high − low)

Source    Su et al. 2021; Llama 3.1's release (rope_type "llama3" of Hugging Face)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.engine.config import SLIDING, Qwen2Config
from mesp_ref.files.config import rope_fields
from mesp_ref.ops import Array

Tables = tuple[Array, Array]


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Array:
    """Turns per position of each pair, in float64."""
    f: Array = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    if not scaling:
        return f
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return f / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    found: Array = (1 - smooth) * f / factor + smooth * f
    return found


def tables(
    positions: Array, head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Array, Array]:
    """cos and sin [T, D/2] of each position, in float64."""
    angle = positions.astype(np.float64)[:, None] * frequencies(head_dim, theta, scaling)
    return np.cos(angle), np.sin(angle)


def model_tables(config: Qwen2Config, tokens: int) -> tuple[Tables, Tables | None]:
    """cos and sin of a model's layers on positions from 0; and of those with a window, if there are."""
    at, rope = np.arange(tokens), rope_fields(config)
    scaling = rope if "factor" in rope else None
    whole = tables(at, config.head_dim, config.rope_theta, scaling)
    if SLIDING not in config.layer_types:
        return whole, None
    return whole, tables(at, config.head_dim, config.rope_local_base_freq)
