"""How an op's tensors round: magnitude of the output, longest sum, roundings to storage."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.ops import IGNORED, Array
from mesp_ref.ops.registry import OPS, Args, Sizes
from mesp_ref.verify.magnitude import magnitudes

# s: roundings to storage on the way to each tensor when every intermediate is stored, an op of a
# framework at a time (a fused kernel has fewer). Of an op's longest path, with the scores of
# attention and the logits of lm_loss counted once: mag carries them through the exponential.
ROUNDINGS: dict[str, dict[str, int]] = {
    "linear": {"y": 2, "dx": 1, "dw": 1, "db": 1},
    "lora_linear": {"y": 5, "dx": 5, "dA": 3, "dB": 3, "dw": 1, "db": 1},
    "rmsnorm": {"y": 3, "dx": 5, "dw": 3},
    "rope": {"y": 3, "dx": 3},
    "causal_softmax": {"y": 3, "ds": 4},
    "attention": {"y": 5, "dq": 8, "dk": 8, "dv": 5},
    "swiglu": {"y": 3, "dgate": 6, "dup": 3},
    "embedding": {"y": 0, "dw": 3},
    "cross_entropy": {"y": 3, "dlogits": 4},
    "lm_loss": {"y": 4, "dx": 5, "dw": 5},
}

# The longest sum of the forward; that of the backward is the registry's.
_FORWARD_SUM: dict[str, Callable[[Sizes], int]] = {
    "linear": lambda z: z.c + 1,
    "lora_linear": lambda z: z.c + z.r + 1,
    "rmsnorm": lambda z: z.c,
    "rope": lambda z: 2,
    "causal_softmax": lambda z: z.t + z.past,
    "attention": lambda z: z.d + z.t + z.past,
    "swiglu": lambda z: 1,
    "embedding": lambda z: 0,
    "cross_entropy": lambda z: z.v + z.n * z.t,
    "lm_loss": lambda z: z.c + z.v + z.n * z.t,
}


def reduction_length(op: str, name: str, sizes: Sizes) -> int:
    """k of a tensor: of the output "y", or of any gradient."""
    return _FORWARD_SUM[op](sizes) if name == "y" else OPS[op].reduction_length(sizes)


def _linear(x: Array, w: Array, b: Array | None = None) -> Array:
    y = np.abs(x) @ np.abs(w).T
    return y if b is None else y + np.abs(b)


def _lora_linear(x: Array, w: Array, b: Array | None, A: Array, B: Array, s: float) -> Array:
    return _linear(x, w, b) + abs(s) * (_linear(x, A) @ np.abs(B).T)


def _rmsnorm(x: Array, w: Array, eps: float) -> Array:
    return np.abs(x * w) / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _rope(x: Array, cos: Array, sin: Array) -> Array:
    cos, sin = np.abs(cos)[:, None], np.abs(sin)[:, None]
    x1, x2 = np.split(np.abs(x), 2, axis=-1)
    return np.concatenate([x1 * cos + x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _probabilities(s: Array, mag_s: Array) -> tuple[Array, Array]:
    """p and mag_p = p·(1 + mag_s + Σ p·mag_s); the subtraction of the maximum adds its distance."""
    tq, tk = s.shape[-2:]
    visible = np.tri(tq, tk, tk - tq, dtype=bool)
    s = np.where(visible, s, -np.inf)
    distance = np.where(visible, s.max(axis=-1, keepdims=True) - s, 0)
    p = np.where(visible, np.exp(-distance), 0)
    p /= p.sum(axis=-1, keepdims=True)
    mag_s = mag_s + distance
    return p, p * (1 + mag_s + (p * mag_s).sum(axis=-1, keepdims=True))


def _causal_softmax(s: Array) -> Array:
    return _probabilities(s, np.zeros_like(s))[1]


def _attention(q: Array, k: Array, v: Array) -> Array:
    share, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k, v = k.repeat(share, axis=2), v.repeat(share, axis=2)
    s = np.einsum("nqhd,nkhd->nhqk", q, k) * scale
    mag_s = np.einsum("nqhd,nkhd->nhqk", np.abs(q), np.abs(k)) * scale
    return np.einsum("nhqk,nkhd->nqhd", _probabilities(s, mag_s)[1], np.abs(v))


def _swiglu(gate: Array, up: Array) -> Array:
    e = np.exp(-np.abs(gate))
    return np.abs(gate * up) * np.where(gate >= 0, 1, e) / (1 + e)


def _embedding(ids: Array, w: Array) -> Array:
    return np.abs(w[ids])


def _cross_entropy(logits: Array, labels: Array, mag_logits: Array | None = None) -> Array:
    """Per counted row log Σ exp z and the label's logit, and p·mag of the logits.

    In absolute values as the equation has them: a backend may form log Σ exp z in full.
    """
    counted = np.flatnonzero(labels != IGNORED)
    z = logits[counted]
    mag = np.zeros_like(z) if mag_logits is None else mag_logits[counted]
    distance = z.max(axis=1, keepdims=True, initial=-np.inf) - z
    total = np.exp(-distance).sum(axis=1)
    p, at = np.exp(-distance) / total[:, None], (np.arange(len(z)), labels[counted])
    peak = np.abs(z).max(axis=1, initial=0)
    rows = 1 + peak + np.log(total) + np.abs(z[at]) + mag[at] + (p * (mag + distance)).sum(axis=1)
    return np.asarray(rows.sum() / max(1, len(z)))


def _lm_loss(x: Array, w: Array, labels: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    return _cross_entropy(rows @ w.T, labels.reshape(-1), _linear(rows, w))


OUTPUT_MAGNITUDES: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "lora_linear": _lora_linear,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "causal_softmax": _causal_softmax,
    "attention": _attention,
    "swiglu": _swiglu,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
}


def gradient_magnitudes(op: str, dy: Array, args: Args) -> dict[str, Array]:
    """mag of every gradient by argument: that of verify, but silu's slope as commonly computed.

    Our swiglu forms 1 − σ without cancellation; σ + gate·σ·(1 − σ) as written rounds like
    σ·(1 + |gate|), and that is no mistake.
    """
    mags = magnitudes(op, dy, args)
    if op == "swiglu":
        gate = args["gate"]
        sig = 1 / (1 + np.exp(-gate))
        mags["gate"] = np.abs(dy * args["up"]) * sig * (1 + np.abs(gate))
    return mags


def output_magnitude(op: str, args: Args) -> Array:
    """mag of an op's output, to first order through every intermediate."""
    values: dict[str, Any] = dict(args)
    return OUTPUT_MAGNITUDES[op](**values)
