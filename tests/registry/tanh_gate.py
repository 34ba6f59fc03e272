"""A whole op in one file: y = x·tanh(w·x) with a slope w for every channel, and its row."""

from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import Args, Golden, OpCase, OpSpec, Sizes


class TanhGateRes(NamedTuple):
    x: Array  # [..., C]
    t: Array | None  # [..., C], tanh(w·x); None once dropped: the backward rebuilds it


def tanh_gate(
    x: Array, w: Array, *, drop: frozenset[str] = frozenset()
) -> tuple[Array, TanhGateRes]:
    t = np.tanh(w * x)
    return x * t, TanhGateRes(x, None if "t" in drop else t)


def tanh_gate_bwd(dy: Array, res: TanhGateRes, w: Array) -> Array:
    """dx = dy·(t + x·w·(1 − t²))"""
    t = np.tanh(w * res.x) if res.t is None else res.t
    return dy * (t + res.x * w * (1 - t * t))


def tanh_gate_bwd_params(dy: Array, res: TanhGateRes, w: Array) -> Array:
    """dw = Σ_rows dy·x²·(1 − t²)"""
    t = np.tanh(w * res.x) if res.t is None else res.t
    return (dy * res.x * res.x * (1 - t * t)).reshape(-1, len(w)).sum(axis=0)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = rng.standard_normal((z.n, z.t, z.c)), rng.standard_normal(z.c)
    return {"x": x.astype(dtype), "w": w.astype(dtype)}


def equation(x: Array, w: Array) -> Array:
    """y = x·(e^a − e^−a)/(e^a + e^−a) with a = w·x"""
    from mesp_ref.registry.exact import exp

    y = np.empty(x.shape, object)
    for at in np.ndindex(*x.shape):
        a = w[at[-1]] * x[at]
        y[at] = x[at] * (exp(a) - exp(-a)) / (exp(a) + exp(-a))
    return y


def magnitude(dy: Array, res: Any, w: Array) -> Array:
    """1 − t² cancels, and carries the rounding of w·x."""
    a = np.abs(w * res.x)
    return np.abs(dy) * (np.abs(res.t) + a * (1 + res.t**2) * (1 + a))


def magnitude_params(dy: Array, res: Any, w: Array) -> Array:
    a = np.abs(w * res.x)
    mag = np.abs(dy) * res.x**2 * (1 + res.t**2) * (1 + a)
    return mag.reshape(-1, len(w)).sum(axis=0)


ROW = OpSpec(
    name="tanh_gate",
    forward=tanh_gate,
    backward=tanh_gate_bwd,
    backward_params=tanh_gate_bwd_params,
    activations=("x",),
    parameters=("w",),
    droppable=("t",),
    sample=sample,
    reduction_length=lambda z: z.n * z.t,
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=(
            OpCase("usual", "ordinary numbers"),
            OpCase("saturated", "tanh near ±1", change=lambda args: args | {"x": args["x"] * 8}),
        ),
        roundings={"y": 3, "dx": 6, "dw": 6},
        forward_length=lambda z: 1,
        output_magnitude=lambda x, w: np.abs(x) * (np.abs(np.tanh(w * x)) + np.abs(w * x)),
        torch=lambda torch, x, w: x * torch.tanh(w * x),
        functional=lambda fw, x, w: x * fw.xp.tanh(w * x),
    ),
)
