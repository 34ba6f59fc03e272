"""Ordinary models to check on: small, all axis lengths different, nothing zero, nothing one."""

from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import FAMILIES, Qwen2Config
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.ops import IGNORED, Array, RopeScaling


def small_config(tied: bool = True, **changed: Any) -> Qwen2Config:
    """Two blocks, four query heads on two key/value heads; eps and theta large enough to matter."""
    sizes: dict[str, Any] = {
        "vocab_size": 11, "hidden_size": 7, "intermediate_size": 9, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "rms_norm_eps": 1e-2, "rope_theta": 100.0,
    }  # fmt: skip
    return Qwen2Config(**sizes | {"tie_word_embeddings": tied} | changed)


# What a small model of each family has beside small_config: traits, scaled angles, windows, all alive.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "traits": FAMILIES["llama"], "attention_bias": True,
        "rope_theta": 30.0, "rope_scaling": RopeScaling(3.0, 40, 1.0, 5.0),  # one between the two
    },
    "smollm3": {"traits": FAMILIES["smollm3"], "layer_types": ("no_rope", "full_attention")},
    "qwen3": {"traits": FAMILIES["qwen3"]},
    "gemma3": {
        "traits": FAMILIES["gemma3_text"], "attention_scale": 0.5, "sliding_window": 3,
        "layer_types": ("sliding_attention", "full_attention"), "rope_local_base_freq": 30.0,
        "rope_scaling": RopeScaling(2.0),
    },
}  # fmt: skip


def sample_model(rng: np.random.Generator, config: Qwen2Config, dtype: Any = "float64") -> Model:
    """Weights normal(0, 1/√in); norms and biases random too, so that none of them can hide."""
    arrays = {
        name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)
        for name, shape in config.weight_shapes().items()
    }
    return Model(config, arrays)


def sample_adapter(
    rng: np.random.Generator, config: Qwen2Config, dtype: Any = "float64", **options: Any
) -> Adapter:
    """An adapter with B ≠ 0, of rank 3 and scale 4/3 on all seven projections."""
    given: dict[str, Any] = {"rank": 3, "alpha": 4.0, "b_std": 0.2}
    return init_lora(config, seed=int(rng.integers(2**31)), dtype=dtype, **given | options)


def sample_batch(
    rng: np.random.Generator, config: Qwen2Config, shape: tuple[int, int] = (2, 5)
) -> tuple[Array, Array]:
    """Token ids with repeats, and labels of which a third is −100."""
    ids = rng.integers(0, config.vocab_size, shape)
    labels = ids.copy()
    labels[:, ::3] = IGNORED
    return ids, labels
