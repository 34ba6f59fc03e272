"""The equation of a whole model, from those of its ops (see registry): arbitrary precision.

Nothing is shared with `engine`, no gradient formula is used, and no trick for speed or stability: at
50 digits none is needed. Arrays hold mpmath numbers (NumPy arrays of objects).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import (
    attention,
    embedding,
    geglu,
    linear,
    lm_loss,
    lora_linear,
    rmsnorm,
    rope,
    swiglu,
)
from mesp_ref.registry.exact import array


class _Layer(NamedTuple):
    """What a block computes with beside its tensors, in numbers of any precision."""

    config: Any
    s: Any
    eps: Any
    turn: tuple[Array, Array]
    first: Array | None
    scale: Any


def _block(x: Array, part: Callable[[str], Any], of: _Layer) -> Array:
    """a = x + after(o_proj(attention(n₁)));  y = a + after(down_proj(z)); `part` gives its tensors."""
    traits = of.config.traits

    def project(name: str, x: Array) -> Array:
        w, b, A, B = (part(f"{name}.{kind}") for kind in ("weight", "bias", "lora_A", "lora_B"))
        return linear.equation(x, w, b) if A is None else lora_linear.equation(x, w, b, A, B, of.s)

    def norm(name: str, x: Array) -> Array:
        return rmsnorm.equation(x, part(f"{name}.weight"), of.eps) if name else x

    (before, after), (before_mlp, after_mlp) = traits.norms
    n, heads = norm(before, x), []
    for letter in "qkv":
        y = project(f"self_attn.{letter}_proj", n)
        y = y.reshape(*y.shape[:2], -1, of.config.head_dim)
        if letter != "v" and traits.head_norms:
            y = norm(f"self_attn.{letter}_norm", y)
        heads.append(y if letter == "v" else rope.equation(y, *of.turn))
    q, k, v = heads
    o = attention.equation(q, k, v, of.first, of.scale)
    a = x + norm(after, project("self_attn.o_proj", o.reshape(*o.shape[:2], -1)))
    n = norm(before_mlp, a)
    gate = geglu if traits.gelu else swiglu
    z = gate.equation(project("mlp.gate_proj", n), project("mlp.up_proj", n))
    return a + norm(after_mlp, project("mlp.down_proj", z))


def angles(config: Any, kind: str, tokens: int) -> Array:
    """The angle of each position, t·f_i: [T, D/2], in layers of a kind.

    Scaled    of wavelength 2π/f: shorter than original/high stays, longer than original/low is
              stretched by the factor, between them the two are mixed in proportion
    """
    import mpmath

    mpf, half = mpmath.mpf, config.head_dim // 2
    local = kind == "sliding_attention"
    theta = mpf(config.rope_local_base_freq if local else config.rope_theta)

    def frequency(i: int) -> Any:
        f, scaling = theta ** (-mpf(i) / half), None if local else config.rope_scaling
        if kind == "no_rope":
            return mpf(0)
        if scaling is None:
            return f
        if scaling.original is None:
            return f / mpf(scaling.factor)
        length, low, high = (
            scaling.original * f / (2 * mpmath.pi),
            mpf(scaling.low),
            mpf(scaling.high),
        )
        part = min(mpf(1), max(mpf(0), (length - low) / (high - low)))
        return part * f + (1 - part) * f / mpf(scaling.factor)

    return array((tokens, half), lambda t, i: t * frequency(i))


def _layer(config: Any, number: int, tokens: int, s: Any) -> _Layer:
    import mpmath

    kind = config.layer_type(number)
    angle = angles(config, kind, tokens)
    cos = array(angle.shape, lambda *at: mpmath.cos(angle[at]))
    sin = array(angle.shape, lambda *at: mpmath.sin(angle[at]))
    first = None
    if kind == "sliding_attention":
        first = np.array([[max(0, t - config.sliding_window + 1) for t in range(tokens)]])
    scale = None if config.attention_scale is None else mpmath.mpf(config.attention_scale)
    return _Layer(config, s, mpmath.mpf(config.rms_norm_eps), (cos, sin), first, scale)


def model(config: Any, ids: Array, labels: Array, s: Any, **tensors: Array) -> Array:
    """The loss of a whole model with LoRA; tensors under their checkpoint and PEFT names, gains of
    norms whole."""
    import mpmath

    x = embedding.equation(ids, tensors["model.embed_tokens.weight"])
    if config.traits.scaled_embedding:
        x = x * mpmath.sqrt(config.hidden_size)
    for number in range(config.num_hidden_layers):

        def part(name: str, number: int = number) -> Any:
            full = f"model.layers.{number}.{name}"
            lora = f"base_model.model.{full}.weight"
            return tensors.get(lora if "lora_" in name else full)

        x = _block(x, part, _layer(config, number, ids.shape[1], s))
    n = rmsnorm.equation(x, tensors["model.norm.weight"], mpmath.mpf(config.rms_norm_eps))
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    moved = np.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return lm_loss.equation(n, head, moved)
