"""How large the terms of a backward are: the yardstick of every rounding gate.

An error relative to max|g| says nothing where terms cancel: softmax at large logits, a confident
cross entropy, RMSNorm of one channel. So each op has here its backward once more on absolute
values, `mag`: every term counted as if it could not cancel. A computed gradient lies within a small
multiple of u·mag of the true one, and where mag is 0 the gradient is exactly 0.

Softmax carries the rounding of its scores to first order: exp turns an absolute error of s into a
relative one of p, so mag_p = p·(1 + mag_s + Σ p·mag_s), with mag_s what the score was summed from.

Same arguments as the backwards, `dy` itself a magnitude; the formulas stand in the ops' docstrings.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import IGNORED, Array
from mesp_ref.ops.registry import OPS, Args


def _rows(x: Array) -> Array:
    return np.abs(x).reshape(-1, x.shape[-1])


def _linear(dy: Array, res: Any, w: Array, b: Any = None) -> Array:
    return (_rows(dy) @ np.abs(w)).reshape(*dy.shape[:-1], -1)


def _linear_params(dy: Array, res: Any, w: Array, b: Any = None) -> tuple[Array, Array | None]:
    return _rows(dy).T @ _rows(res.x), None if b is None else _rows(dy).sum(axis=0)


def _lora_linear(
    dy: Array, res: Any, w: Array, b: Any, A: Array, B: Array, *, s: float
) -> tuple[Array, Array, Array]:
    x, dy2, s = _rows(res.x), _rows(dy), abs(s)
    dh, h = dy2 @ np.abs(B) * s, x @ np.abs(A).T
    dx = dy2 @ np.abs(w) + dh @ np.abs(A)
    return dx.reshape(*dy.shape[:-1], -1), dh.T @ x, dy2.T @ h * s


def _lora_linear_params(
    dy: Array, res: Any, w: Array, b: Any, A: Array, B: Array, *, s: float
) -> tuple[Array, Array | None]:
    return _linear_params(dy, res, w, b)


def _inverse_rms(x: Array, eps: float) -> Array:
    return 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _rmsnorm(dy: Array, res: Any, w: Array, *, eps: float) -> Array:
    x, r, u = np.abs(res.x), _inverse_rms(res.x, eps), np.abs(dy * w)
    return u * r + x * (u * x).mean(axis=-1, keepdims=True) * r**3


def _rmsnorm_params(dy: Array, res: Any, w: Array, *, eps: float) -> Array:
    return (
        (np.abs(dy) * _rows(res.x * _inverse_rms(res.x, eps)).reshape(dy.shape))
        .reshape(-1, len(w))
        .sum(axis=0)
    )


def _rope(dy: Array, res: Any, cos: Array, sin: Array) -> Array:
    cos, sin = np.abs(cos)[:, None], np.abs(sin)[:, None]
    y1, y2 = np.split(np.abs(dy), 2, axis=-1)
    return np.concatenate([y1 * cos + y2 * sin, y2 * cos + y1 * sin], axis=-1)


def _carried(p: Array, mag_s: Array) -> Array:
    """mag_p = p·(1 + mag_s + Σ p·mag_s) along the last axis."""
    return p * (1 + mag_s + (p * mag_s).sum(axis=-1, keepdims=True))


def _softmax(dp: Array, p: Array, mag_p: Array) -> Array:
    along = (dp * mag_p).sum(axis=-1, keepdims=True)
    return mag_p * (dp + (dp * p).sum(axis=-1, keepdims=True)) + p * along


def _causal_softmax(dp: Array, res: Any) -> Array:
    """The distance of a score from its row's maximum is log(max p / p)."""
    p = res.p
    peak = p.max(axis=-1, keepdims=True)
    distance = np.log(np.divide(peak, p, out=np.ones_like(p), where=p > 0))
    return _softmax(np.abs(dp), p, _carried(p, distance))


def _attention(do: Array, res: Any) -> tuple[Array, Array, Array]:
    groups, d = res.k.shape[2], res.q.shape[3]
    q, k, v, do = (np.abs(a).swapaxes(1, 2) for a in (res.q, res.k, res.v, do))  # [N, H, T, D]
    share = q.shape[1] // groups
    k, v = k.repeat(share, axis=1), v.repeat(share, axis=1)
    mag_p = _carried(res.p, q @ k.swapaxes(2, 3) * d**-0.5)
    ds = _softmax(do @ v.swapaxes(2, 3), res.p, mag_p) * d**-0.5

    def shared(x: Array) -> Array:
        return x.reshape(len(x), groups, share, *x.shape[2:]).sum(axis=2).swapaxes(1, 2)

    dv, dk = mag_p.swapaxes(2, 3) @ do, ds.swapaxes(2, 3) @ q
    return (ds @ k).swapaxes(1, 2), shared(dk), shared(dv)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _swiglu(dz: Array, res: Any) -> tuple[Array, Array]:
    gate, sig = np.abs(res.gate), _sigmoid(res.gate)
    slope = sig + gate * sig * _sigmoid(-res.gate)
    return np.abs(dz * res.up) * slope, np.abs(dz) * gate * sig


def _mlp(
    x: Array, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
) -> tuple[Array, tuple[Any, ...]]:  # fmt: skip
    """The gated MLP from plain ops: its value and their residuals."""
    gate, rg = ops.lora_linear(x, wg, None, Ag, Bg, s=s)
    up, ru = ops.lora_linear(x, wu, None, Au, Bu, s=s)
    z, rz = ops.swiglu(gate, up)
    y, rd = ops.lora_linear(z, wd, None, Ad, Bd, s=s)
    return y, (rg, ru, rz, rd)


def _mlp_carried(
    dz: Array, res: Any, wg: Array, wu: Array, Ag: Array, Bg: Array, Au: Array, Bu: Array, s: float
) -> tuple[Array, Array, Array]:
    """mag of z, dgate and dup: gate and up are sums, whose rounding the gate passes on.

    |silu'| ≤ σ + |g|·σ(−g)·σ and |silu''| ≤ σ·σ(−g)·(2 + |g|)
    """
    rg, _, rz, _ = res
    x = np.abs(rg.x)
    mag_gate, mag_up = (
        x @ np.abs(w).T + abs(s) * (x @ np.abs(A).T) @ np.abs(B).T
        for w, A, B in ((wg, Ag, Bg), (wu, Au, Bu))
    )
    g, up, sig, rest = np.abs(rz.gate), np.abs(rz.up), _sigmoid(rz.gate), _sigmoid(-rz.gate)
    silu, slope, bend = g * sig, sig + g * sig * rest, sig * rest * (2 + g)
    mag_z = slope * mag_gate * up + silu * mag_up
    dgate = dz * (slope * mag_up + bend * mag_gate * up)
    return mag_z, dgate, dz * (silu + slope * mag_gate)


def _mlp_bwd(
    dy: Array, res: Any, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
) -> tuple[Array, ...]:  # fmt: skip
    rg, ru, _, rd = res
    dz = _lora_linear(dy, rd, wd, None, Ad, Bd, s=s)[0]
    z, dgate, dup = _mlp_carried(dz, res, wg, wu, Ag, Bg, Au, Bu, s)
    _, dAd, dBd = _lora_linear(dy, rd._replace(x=z), wd, None, Ad, Bd, s=s)
    dx_g, dAg, dBg = _lora_linear(dgate, rg, wg, None, Ag, Bg, s=s)
    dx_u, dAu, dBu = _lora_linear(dup, ru, wu, None, Au, Bu, s=s)
    return dx_g + dx_u, dAg, dBg, dAu, dBu, dAd, dBd


def _mlp_params(
    dy: Array, res: Any, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
) -> tuple[Array, ...]:  # fmt: skip
    rg, ru, _, rd = res
    dz = _lora_linear(dy, rd, wd, None, Ad, Bd, s=s)[0]
    z, dgate, dup = _mlp_carried(dz, res, wg, wu, Ag, Bg, Au, Bu, s)
    layers = (dgate, rg, wg), (dup, ru, wu), (dy, rd._replace(x=z), wd)
    return tuple(_linear_params(d, r, w)[0] for d, r, w in layers)


def _embedding_params(dy: Array, res: Any, w: Any) -> Array:
    dw = np.zeros(w.shape, dy.dtype)
    np.add.at(dw, res.ids, np.abs(dy))
    return dw


def _dlogits(logits: Array, labels: Array, mag_logits: Array | None = None) -> Array:
    """(softmax + onehot)/count on counted rows; `mag_logits` where the logits are sums."""
    counted = np.flatnonzero(labels != IGNORED)
    z, mag = logits[counted], np.zeros_like(logits)
    distance = z.max(axis=1, keepdims=True, initial=-np.inf) - z
    p = np.exp(-distance)
    p /= p.sum(axis=1, keepdims=True)
    mag_p = _carried(p, distance if mag_logits is None else distance + mag_logits[counted])
    mag_p[np.arange(len(counted)), labels[counted]] += 1
    mag[counted] = mag_p / max(1, len(counted))
    return mag


def _cross_entropy(dloss: Any, res: Any) -> Array:
    return abs(dloss) * _dlogits(res.logits, res.labels)


def _whole(w: Any) -> Array:
    """A weight as one array."""
    return np.asarray(w[...])


def _head(res: Any, w: Array) -> Array:
    mag = _rows(res.x) @ np.abs(w).T
    return _dlogits(res.x.reshape(-1, res.x.shape[-1]) @ w.T, res.labels.reshape(-1), mag)


def _lm_loss(dloss: Any, res: Any, w: Any) -> Array:
    w = _whole(w)
    return (abs(dloss) * _head(res, w) @ np.abs(w)).reshape(res.x.shape)


def _lm_loss_params(dloss: Any, res: Any, w: Any) -> Array:
    return abs(dloss) * _head(res, _whole(w)).T @ _rows(res.x)


# By the name of the backward, so that they can stand in for the ops of a whole model.
MAGNITUDES: dict[str, Callable[..., Any]] = {
    "linear_bwd": _linear,
    "linear_bwd_params": _linear_params,
    "lora_linear_bwd": _lora_linear,
    "lora_linear_bwd_params": _lora_linear_params,
    "rmsnorm_bwd": _rmsnorm,
    "rmsnorm_bwd_params": _rmsnorm_params,
    "rope_bwd": _rope,
    "causal_softmax_bwd": _causal_softmax,
    "attention_bwd": _attention,
    "swiglu_bwd": _swiglu,
    "mlp_bwd": _mlp_bwd,
    "mlp_bwd_params": _mlp_params,
    "embedding_bwd_params": _embedding_params,
    "cross_entropy_bwd": _cross_entropy,
    "lm_loss_bwd": _lm_loss,
    "lm_loss_bwd_params": _lm_loss_params,
}

# As imported: what is planted into OPS later must not reach the yardstick.
_PLAIN = dict(OPS) | {"mlp": replace(OPS["tiled_mlp"], forward=_mlp)}


def magnitudes(oracle: str, dy: Array, args: Args) -> dict[str, Array]:
    """mag of every gradient of the op that `oracle` names, by argument."""
    row = _PLAIN[oracle]
    known = set(inspect.signature(row.forward).parameters)
    row = replace(
        row,
        backward=MAGNITUDES.get(f"{oracle}_bwd"),
        backward_params=MAGNITUDES.get(f"{oracle}_bwd_params"),
    )
    return row.vjp(np.abs(dy), {name: value for name, value in args.items() if name in known})
