"""The equation of a whole model, from those of its ops (see registry): arbitrary precision.

Nothing is shared with `engine`, no gradient formula is used, and no trick for speed or stability: at
50 digits none is needed. Arrays hold mpmath numbers (NumPy arrays of objects).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import (
    attention,
    embedding,
    linear,
    lm_loss,
    lora_linear,
    rmsnorm,
    rope,
    swiglu,
)
from mesp_ref.registry.exact import array


def _block(
    x: Array, part: Callable[[str], Any], head_dim: int, s: Any, eps: Any, turn: tuple[Array, Array]
) -> Array:
    """a = x + o_proj(attention(n₁));  y = a + down_proj(swiglu(n₂)); `part` gives its tensors."""

    def project(name: str, x: Array) -> Array:
        w, b, A, B = (part(f"{name}.{kind}") for kind in ("weight", "bias", "lora_A", "lora_B"))
        return linear.equation(x, w, b) if A is None else lora_linear.equation(x, w, b, A, B, s)

    n = rmsnorm.equation(x, part("input_layernorm.weight"), eps)
    heads = []
    for letter in "qkv":
        y = project(f"self_attn.{letter}_proj", n)
        y = y.reshape(*y.shape[:2], -1, head_dim)
        heads.append(y if letter == "v" else rope.equation(y, *turn))
    o = attention.equation(*heads)
    a = x + project("self_attn.o_proj", o.reshape(*o.shape[:2], -1))
    n = rmsnorm.equation(a, part("post_attention_layernorm.weight"), eps)
    z = swiglu.equation(project("mlp.gate_proj", n), project("mlp.up_proj", n))
    return a + project("mlp.down_proj", z)


def model(config: Any, ids: Array, labels: Array, s: Any, **tensors: Array) -> Array:
    """The loss of a whole Qwen2 model with LoRA; tensors under their checkpoint and PEFT names."""
    import mpmath

    mpf = mpmath.mpf
    eps, half = mpf(config.rms_norm_eps), config.head_dim // 2
    angle = array((ids.shape[1], half), lambda t, i: t * mpf(config.rope_theta) ** (-mpf(i) / half))
    cos = array(angle.shape, lambda *at: mpmath.cos(angle[at]))
    sin = array(angle.shape, lambda *at: mpmath.sin(angle[at]))
    x = embedding.equation(ids, tensors["model.embed_tokens.weight"])
    for number in range(config.num_hidden_layers):

        def part(name: str, number: int = number) -> Any:
            full = f"model.layers.{number}.{name}"
            lora = f"base_model.model.{full}.weight"
            return tensors.get(lora if "lora_" in name else full)

        x = _block(x, part, config.head_dim, s, eps, (cos, sin))
    n = rmsnorm.equation(x, tensors["model.norm.weight"], eps)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    moved = np.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return lm_loss.equation(n, head, moved)
