"""Every forward once more, from its equation, in arbitrary precision.

Nothing is shared with `ops`, no gradient formula is used, and no trick for speed or stability: at
50 digits none is needed. Arrays hold mpmath numbers (NumPy arrays of objects); indices are written
out. Token ids, labels and labels of −100 are those of the ops.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import numpy as np

from mesp_ref.ops import Array

mp = mpmath.mp


def _array(shape: tuple[int, ...], entry: Callable[..., Any]) -> Array:
    y = np.empty(shape, object)
    for at in np.ndindex(*shape):
        y[at] = entry(*at)
    return y


def _dot(a: Array, b: Array) -> Any:
    return mp.fdot(list(a), list(b))


def linear(x: Array, w: Array, b: Array | None = None) -> Array:
    """y_o = Σ_i x_i·w_oi + b_o"""

    def entry(*at: int) -> Any:
        return _dot(x[at[:-1]], w[at[-1]]) + (0 if b is None else b[at[-1]])

    return _array((*x.shape[:-1], len(w)), entry)


def lora_linear(x: Array, w: Array, b: Array | None, A: Array, B: Array, s: Any) -> Array:
    """y = x·(W + s·B·A)ᵀ + b: the adapter as the change of weight that it is."""
    merged = _array(w.shape, lambda o, i: w[o, i] + s * _dot(B[o], A[:, i]))
    return linear(x, merged, b)


def rmsnorm(x: Array, w: Array, eps: Any) -> Array:
    """y_c = w_c·x_c / sqrt((1/C)·Σ x² + eps)"""

    def entry(*at: int) -> Any:
        row = x[at[:-1]]
        return w[at[-1]] * x[at] / mp.sqrt(_dot(row, row) / len(row) + eps)

    return _array(x.shape, entry)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """(x_i + j·x_{i+D/2})·(cos + j·sin): a turn in the complex plane of each pair."""
    half = x.shape[-1] // 2

    def entry(n: int, t: int, h: int, i: int) -> Any:
        k = i % half
        c, s = cos[t, k], sin[t, k]
        real, imaginary = x[n, t, h, k], x[n, t, h, k + half]
        return real * c - imaginary * s if i < half else imaginary * c + real * s

    return _array(x.shape, entry)


def causal_softmax(s: Array) -> Array:
    """p_ij = exp(s_ij)/Σ_{j visible} exp(s_ij); query i of Tq sees keys j ≤ i + Tk − Tq"""
    tq, tk = s.shape[-2:]
    p = np.empty(s.shape, object)
    for at in np.ndindex(*s.shape[:-1]):
        visible = at[-1] + tk - tq + 1
        e = [mp.exp(value) for value in s[at][:visible]]
        p[at] = [*(value / mp.fsum(e) for value in e), *[mp.mpf(0)] * (tk - visible)]
    return p


def attention(q: Array, k: Array, v: Array) -> Array:
    """o = softmax(q·kᵀ/√D)·v per query head h, with key/value head h // (H/G)"""
    n, tq, heads, d = q.shape
    share, scale = heads // k.shape[2], 1 / mp.sqrt(d)
    s = _array(
        (n, heads, tq, k.shape[1]),
        lambda b, h, i, j: _dot(q[b, i, h], k[b, j, h // share]) * scale,
    )
    p = causal_softmax(s)
    return _array(q.shape, lambda b, i, h, c: _dot(p[b, h, i], v[b, :, h // share, c]))


def swiglu(gate: Array, up: Array) -> Array:
    """z = gate/(1 + exp(−gate))·up"""
    return _array(gate.shape, lambda *at: gate[at] / (1 + mp.exp(-gate[at])) * up[at])


def mlp(
    x: Array, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, s: Any,
) -> Array:  # fmt: skip
    """down(swiglu(gate(x), up(x))), each projection with its adapter"""
    z = swiglu(lora_linear(x, wg, None, Ag, Bg, s), lora_linear(x, wu, None, Au, Bu, s))
    return lora_linear(z, wd, None, Ad, Bd, s)


def embedding(ids: Array, w: Array) -> Array:
    """y_t = w[ids_t]"""
    return _array((*ids.shape, w.shape[1]), lambda *at: w[ids[at[:-1]], at[-1]])


def cross_entropy(logits: Array, labels: Array) -> Array:
    """−(1/count)·Σ_counted log(exp(z_label)/Σ exp(z))"""
    counted = [row for row in range(len(labels)) if labels[row] != -100]

    def negative_log_likelihood(row: int) -> Any:
        total = mp.fsum(mp.exp(z) for z in logits[row])
        return -mp.log(mp.exp(logits[row, labels[row]]) / total)

    losses: Iterator[Any] = (negative_log_likelihood(row) for row in counted)
    return np.array(mp.fsum(losses) / max(1, len(counted)), object)


def lm_loss(x: Array, w: Array, labels: Array) -> Array:
    """cross_entropy of x·Wᵀ"""
    logits = linear(x, w)
    return cross_entropy(logits.reshape(-1, len(w)), labels.reshape(-1))


def _block(
    x: Array, part: Callable[[str], Any], head_dim: int, s: Any, eps: Any, turn: tuple[Array, Array]
) -> Array:
    """a = x + o_proj(attention(n₁));  y = a + down_proj(swiglu(n₂)); `part` gives its tensors."""

    def project(name: str, x: Array) -> Array:
        w, b, A, B = (part(f"{name}.{kind}") for kind in ("weight", "bias", "lora_A", "lora_B"))
        return linear(x, w, b) if A is None else lora_linear(x, w, b, A, B, s)

    n = rmsnorm(x, part("input_layernorm.weight"), eps)
    heads = []
    for letter in "qkv":
        y = project(f"self_attn.{letter}_proj", n)
        y = y.reshape(*y.shape[:2], -1, head_dim)
        heads.append(y if letter == "v" else rope(y, *turn))
    o = attention(*heads)
    a = x + project("self_attn.o_proj", o.reshape(*o.shape[:2], -1))
    n = rmsnorm(a, part("post_attention_layernorm.weight"), eps)
    z = swiglu(project("mlp.gate_proj", n), project("mlp.up_proj", n))
    return a + project("mlp.down_proj", z)


def model(config: Any, ids: Array, labels: Array, s: Any, **tensors: Array) -> Array:
    """The loss of a whole Qwen2 model with LoRA; tensors under their checkpoint and PEFT names."""
    eps, half = mp.mpf(config.rms_norm_eps), config.head_dim // 2
    angle = _array(
        (ids.shape[1], half), lambda t, i: t * mp.mpf(config.rope_theta) ** (-mp.mpf(i) / half)
    )
    cos = _array(angle.shape, lambda *at: mp.cos(angle[at]))
    sin = _array(angle.shape, lambda *at: mp.sin(angle[at]))
    x = embedding(ids, tensors["model.embed_tokens.weight"])
    for number in range(config.num_hidden_layers):

        def part(name: str, number: int = number) -> Any:
            full = f"model.layers.{number}.{name}"
            lora = f"base_model.model.{full}.weight"
            return tensors.get(lora if "lora_" in name else full)

        x = _block(x, part, config.head_dim, s, eps, (cos, sin))
    n = rmsnorm(x, tensors["model.norm.weight"], eps)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    moved = np.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return lm_loss(n, head, moved)


EQUATIONS: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        linear, lora_linear, rmsnorm, rope, causal_softmax, attention, swiglu, mlp,
        embedding, cross_entropy, lm_loss, model,
    )
}  # fmt: skip
