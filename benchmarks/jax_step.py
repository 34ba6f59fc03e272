"""A LoRA step of Qwen2 in JAX, as one function for jax.jit: what the step of contender.py compiles.

Weights and adapter are dictionaries of arrays by their names in the files: W as [out, in], A [R, in],
B [out, R]. Attention is `jax.nn.dot_product_attention`, gradients are `jax.value_and_grad`'s.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Arrays = Mapping[str, Any]
PREFIX = "base_model.model."


def step(config: Mapping[str, Any], scale: float, rate: float) -> Callable[..., Any]:
    """(lora, weights, ids) -> loss, gradients, and the adapter after a step of SGD."""

    def run(lora: Arrays, weights: Arrays, ids: Any) -> Any:
        loss, grads = jax.value_and_grad(_loss)(lora, weights, ids, config, scale)
        return loss, grads, jax.tree.map(lambda w, g: w - rate * g, lora, grads)

    return run


def _loss(lora: Arrays, weights: Arrays, ids: Any, config: Mapping[str, Any], scale: float) -> Any:
    """Mean cross entropy of the next token."""
    x, eps = weights["model.embed_tokens.weight"][ids], config["rms_norm_eps"]
    turn = _angles(ids.shape[1], config)

    def linear(x: Any, name: str) -> Any:
        a, b = (lora[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        y = x @ weights[f"{name}.weight"].T + scale * (x @ a.T) @ b.T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        n = _norm(x, weights[f"{at}input_layernorm.weight"], eps)
        x = x + linear(
            _attention(n, linear, f"{at}self_attn.", turn, config), f"{at}self_attn.o_proj"
        )
        n = _norm(x, weights[f"{at}post_attention_layernorm.weight"], eps)
        z = jax.nn.silu(linear(n, f"{at}mlp.gate_proj")) * linear(n, f"{at}mlp.up_proj")
        x = x + linear(z, f"{at}mlp.down_proj")
    x = _norm(x[:, :-1], weights["model.norm.weight"], eps)
    logits = x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def _norm(x: Any, w: Any, eps: float) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * w


def _angles(tokens: int, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """cos and sin of each position and pair, [T, 1, D]."""
    d = config["head_dim"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angle = jnp.arange(tokens)[:, None] * theta ** (-jnp.arange(0, d, 2) / d)
    whole = jnp.concatenate([angle, angle], axis=-1)[:, None]
    return jnp.cos(whole), jnp.sin(whole)


def _attention(
    n: Any, linear: Callable[..., Any], at: str, turn: tuple[Any, Any], config: Mapping[str, Any]
) -> Any:
    """Causal attention of grouped heads; the output before o_proj."""
    heads = config["num_attention_heads"], *[config["num_key_value_heads"]] * 2
    q, k, v = (
        linear(n, f"{at}{letter}_proj").reshape(*n.shape[:2], count, -1)
        for letter, count in zip("qkv", heads, strict=True)
    )
    q, k = (_rotate(x, *turn) for x in (q, k))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*n.shape[:2], -1)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
