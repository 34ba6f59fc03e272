"""lora_linear: y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ."""

from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.lean.tiled_weight import TiledWeight
from mesp_ref.ops import Array
from mesp_ref.registry import absolute, cases, linear
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, dot
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    A, B = normal(rng, dtype, z.r, z.c), normal(rng, dtype, z.f, z.r)
    return linear.sample(rng, z, dtype) | {"A": A, "B": B, "s": 0.75}


def equation(x: Array, w: Array, b: Array | None, A: Array, B: Array, s: Any) -> Array:
    """y = x·(W + s·B·A)ᵀ + b: the adapter as the change of weight that it is."""
    merged = array(w.shape, lambda o, i: w[o, i] + s * dot(B[o], A[:, i]))
    return linear.equation(x, merged, b)


def magnitude(
    dy: Array, res: Any, w: Array, b: Any, A: Array, B: Array, *, s: float
) -> tuple[Array, Array, Array]:
    x, dy2, s = absolute.rows(res.x), absolute.rows(dy), abs(s)
    dh, h = dy2 @ np.abs(B) * s, x @ np.abs(A).T
    dx = dy2 @ np.abs(w) + dh @ np.abs(A)
    return dx.reshape(*dy.shape[:-1], -1), dh.T @ x, dy2.T @ h * s


def magnitude_params(
    dy: Array, res: Any, w: Array, b: Any, A: Array, B: Array, *, s: float
) -> tuple[Array, Array | None]:
    return linear.magnitude_params(dy, res, w, b)


def output_magnitude(x: Array, w: Array, b: Array | None, A: Array, B: Array, s: float) -> Array:
    h = linear.output_magnitude(x, A)
    return linear.output_magnitude(x, w, b) + abs(s) * (h @ np.abs(B).T)


def torch_twin(torch: Any, x: Any, w: Any, A: Any, B: Any, s: float, b: Any = None) -> Any:
    F = torch.nn.functional
    return F.linear(x, w, b) + s * F.linear(F.linear(x, A), B)


def functional_twin(fw: Namespace, x: Any, w: Any, A: Any, B: Any, s: float, b: Any = None) -> Any:
    return linear.functional_twin(fw, x, w, b) + s * ((x @ A.T) @ B.T)


CASES = (
    OpCase("usual", "B ≠ 0, s = 0.75"),
    OpCase("no_bias", "without a bias", change=cases.without_bias),
    OpCase("rank_1", "rank 1", USUAL._replace(r=1)),
    OpCase("rank_above_width", "rank larger than both sides", USUAL._replace(r=8)),
    OpCase("fresh", "B = 0: the output is the base's, dA exactly 0", change=cases.put(B=0.0)),
    OpCase("no_frozen_part", "W = 0, b = 0: the branch alone", change=cases.put(w=0.0, b=0.0)),
    OpCase("scale_20", "a large scale", change=cases.put(s=20.0)),
    OpCase("scale_2", "alpha 16 at rank 8", change=cases.put(s=2.0)),
    OpCase("one_token", "one row", ONE_TOKEN),
    OpCase("nine_tokens", "one sequence of nine", cases.NINE),
    OpCase("tiny", "x of 1e-4", change=cases.times(x=2.0**-13), dtypes=cases.NO_HALF),
)

ROW = OpSpec(
    name="lora_linear",
    forward=ops.lora_linear,
    backward=ops.lora_linear_bwd,
    backward_params=ops.lora_linear_bwd_params,
    activations=("x",),
    lora=("A", "B"),
    parameters=("w", "b"),
    attributes=("s",),
    optional=("b",),
    droppable=("h",),
    sample=sample,
    reduction_length=lambda z: max(z.f + z.r, z.n * z.t),
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 5, "dx": 5, "dA": 3, "dB": 3, "dw": 1, "db": 1},
        forward_length=lambda z: z.c + z.r + 1,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)


def in_tiles(
    x: Array, w: Array, b: Array | None, A: Array, B: Array, *, s: float, at_once: int
) -> tuple[Array, ops.LoraLinearRes]:
    """lora_linear of a weight that is multiplied `at_once` rows at a time."""
    return ops.lora_linear(x, TiledWeight(w, at_once, at_once), b, A, B, s=s)


def in_tiles_bwd(
    dy: Array, res: ops.LoraLinearRes, w: Array, b: Array | None, A: Array, B: Array,
    *, s: float, at_once: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """VJP of in_tiles, `at_once` columns of the weight at a time."""
    return ops.lora_linear_bwd(dy, res, TiledWeight(w, at_once, at_once), b, A, B, s=s)


TILED = replace(
    ROW,
    name="tiled_lora_linear",
    forward=in_tiles,
    backward=in_tiles_bwd,
    reference=ops.lora_linear,
    attributes=("s", "at_once"),
    droppable=(),
    sample=lambda rng, z, dtype: sample(rng, z, dtype) | {"at_once": 2},
    golden=None,
)
