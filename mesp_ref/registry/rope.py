"""rope: rotary positions, half-split pairs."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry.cases import NINE, ONE_TOKEN, USUAL, Change, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    cos, sin = ops.rope_tables(z.past, z.past + z.t, z.d, 100.0, np.dtype(dtype))
    return {"x": normal(rng, dtype, z.n, z.t, z.h, z.d), "cos": cos, "sin": sin}


def equation(x: Array, cos: Array, sin: Array) -> Array:
    """(x_i + j·x_{i+D/2})·(cos + j·sin): a turn in the complex plane of each pair."""
    half = x.shape[-1] // 2

    def entry(n: int, t: int, h: int, i: int) -> Any:
        k = i % half
        c, s = cos[t, k], sin[t, k]
        real, imaginary = x[n, t, h, k], x[n, t, h, k + half]
        return real * c - imaginary * s if i < half else imaginary * c + real * s

    return array(x.shape, entry)


def magnitude(dy: Array, res: Any, cos: Array, sin: Array) -> Array:
    cos, sin = np.abs(cos)[:, None], np.abs(sin)[:, None]
    y1, y2 = np.split(np.abs(dy), 2, axis=-1)
    return np.concatenate([y1 * cos + y2 * sin, y2 * cos + y1 * sin], axis=-1)


def output_magnitude(x: Array, cos: Array, sin: Array) -> Array:
    return magnitude(x, None, cos, sin)  # a rotation and its transpose differ in signs only


def torch_twin(torch: Any, x: Any, cos: Any, sin: Any) -> Any:
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def functional_twin(fw: Namespace, x: Any, cos: Any, sin: Any) -> Any:
    x1, x2 = fw.xp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return fw.xp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def positions(start: int, theta: float) -> Change:
    """Angles of other positions."""

    def change(args: Args) -> Args:
        t, half = args["cos"].shape
        cos, sin = ops.rope_tables(start, start + t, 2 * half, theta, np.dtype(np.float64))
        return args | {"cos": cos, "sin": sin}

    return change


CASES = (
    OpCase("usual", "positions 2 to 5, theta 100"),
    OpCase("position_0", "angle 0: the identity", ONE_TOKEN),
    OpCase("one_pair", "D = 2", USUAL._replace(d=2)),
    OpCase("wide_head", "D = 8: half-split differs from neighbours", NINE._replace(d=8)),
    OpCase("far", "positions from 30,000, theta 1e6: the tables are given, not computed",
           change=positions(30_000, 1e6)),
    OpCase("quarter_turns", "theta 1: every pair turns alike", change=positions(1, 1.0)),
    OpCase("one_head", "H = 1", USUAL._replace(g=1, share=1)),
)  # fmt: skip

ROW = OpSpec(
    name="rope",
    forward=ops.rope,
    backward=ops.rope_bwd,
    activations=("x",),
    constants=("cos", "sin"),
    sample=sample,
    reduction_length=lambda z: 2,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 3, "dx": 3},
        forward_length=lambda z: 2,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
