"""mlp: the gated MLP with its three adapters, over tiles of its width."""

from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref import lean, ops
from mesp_ref.ops import Array
from mesp_ref.registry import geglu, linear, lora_linear, swiglu
from mesp_ref.registry.absolute import sigmoid
from mesp_ref.registry.draw import normal
from mesp_ref.registry.row import OpSpec
from mesp_ref.registry.sizes import Args, Sizes


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args: Args = {"x": normal(rng, dtype, z.n, z.t, z.c)}
    for letter, (out, into) in {"g": (z.f, z.c), "u": (z.f, z.c), "d": (z.c, z.f)}.items():
        args[f"w{letter}"] = normal(rng, dtype, out, into)
        args[f"A{letter}"] = normal(rng, dtype, z.r, into)
        args[f"B{letter}"] = normal(rng, dtype, out, z.r)
    return args | {"s": 0.25, "width": 2}


def equation(
    x: Array, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, s: Any,
    is_gelu: bool = False,
) -> Array:  # fmt: skip
    """down(swiglu(gate(x), up(x))), or geglu, each projection with its adapter"""
    gate, up = (
        lora_linear.equation(x, w, None, A, B, s) for w, A, B in ((wg, Ag, Bg), (wu, Au, Bu))
    )
    z = (geglu if is_gelu else swiglu).equation(gate, up)
    return lora_linear.equation(z, wd, None, Ad, Bd, s)


def reference(
    x: Array, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
    is_gelu: bool = False,
) -> tuple[Array, tuple[Any, ...]]:  # fmt: skip
    """The gated MLP from plain ops: its value and their residuals."""
    gate, rg = ops.lora_linear(x, wg, None, Ag, Bg, s=s)
    up, ru = ops.lora_linear(x, wu, None, Au, Bu, s=s)
    z, rz = (ops.geglu if is_gelu else ops.swiglu)(gate, up)
    y, rd = ops.lora_linear(z, wd, None, Ad, Bd, s=s)
    return y, (rg, ru, rz, rd)


def _carried(
    dy: Array, res: Any, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, s: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """mag of z, dgate and dup: gate and up are sums, whose rounding the gate passes on."""
    rg, _, rz, rd = res
    dz = lora_linear.magnitude(dy, rd, wd, None, Ad, Bd, s=s)[0]
    x = np.abs(rg.x)
    mag_gate, mag_up = (
        x @ np.abs(w).T + abs(s) * (x @ np.abs(A).T) @ np.abs(B).T
        for w, A, B in ((wg, Ag, Bg), (wu, Au, Bu))
    )
    up, (act, slope, bend) = np.abs(rz.up), activation(rz)
    mag_z = slope * mag_gate * up + act * mag_up
    dgate = dz * (slope * mag_up + bend * mag_gate * up)
    return mag_z, dgate, dz * (act + slope * mag_gate)


def activation(rz: Any) -> tuple[Array, Array, Array]:
    """|silu| or |gelu| of the gate, and bounds of its first two derivatives: g·σ(t) with t = g, or 2u.

    |f'| ≤ σ + |g|·σ·σ(−t)·t′ and |f''| ≤ σ·σ(−t)·(2·t′ + |g|·t′² + |g·t″|)
    """
    signed = rz.gate
    g, turn, once, twice = np.abs(signed), signed, 1.0, 0.0
    if isinstance(rz, ops.GegluRes):
        root, square = 2 * (2 / np.pi) ** 0.5, 0.044715 * signed * signed
        turn, once = root * signed * (1 + square), root * (1 + 3 * square)
        twice = root * 6 * 0.044715 * g
    sig, rest = sigmoid(turn), sigmoid(-turn)
    bend = sig * rest * (2 * once + g * once * once + g * twice)
    return g * sig, sig + g * sig * rest * once, bend


def magnitude(
    dy: Array, res: Any, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
) -> tuple[Array, ...]:  # fmt: skip
    rg, ru, _, rd = res
    z, dgate, dup = _carried(dy, res, wg, wu, wd, Ag, Bg, Au, Bu, Ad, Bd, s)
    _, dAd, dBd = lora_linear.magnitude(dy, rd._replace(x=z), wd, None, Ad, Bd, s=s)
    dx_g, dAg, dBg = lora_linear.magnitude(dgate, rg, wg, None, Ag, Bg, s=s)
    dx_u, dAu, dBu = lora_linear.magnitude(dup, ru, wu, None, Au, Bu, s=s)
    return dx_g + dx_u, dAg, dBg, dAu, dBu, dAd, dBd


def magnitude_params(
    dy: Array, res: Any, wg: Array, wu: Array, wd: Array,
    Ag: Array, Bg: Array, Au: Array, Bu: Array, Ad: Array, Bd: Array, *, s: float,
) -> tuple[Array, ...]:  # fmt: skip
    rg, ru, _, rd = res
    z, dgate, dup = _carried(dy, res, wg, wu, wd, Ag, Bg, Au, Bu, Ad, Bd, s)
    layers = (dgate, rg, wg), (dup, ru, wu), (dy, rd._replace(x=z), wd)
    return tuple(linear.magnitude_params(d, r, w)[0] for d, r, w in layers)


TILED = OpSpec(
    name="tiled_mlp",
    forward=lean.mlp,
    backward=lean.mlp_bwd,
    backward_params=lean.mlp_bwd_params,
    activations=("x",),
    lora=("Ag", "Bg", "Au", "Bu", "Ad", "Bd"),
    parameters=("wg", "wu", "wd"),
    attributes=("s", "is_gelu", "width"),
    sample=sample,
    reduction_length=lambda z: max(2 * z.f + 2 * z.r, z.n * z.t, z.c) + z.c + z.r,
    equation=equation,
    reference=reference,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=None,
)

TILED_GELU = replace(
    TILED,
    name="tiled_gelu_mlp",
    sample=lambda rng, z, dtype: sample(rng, z, dtype) | {"is_gelu": True},
)
