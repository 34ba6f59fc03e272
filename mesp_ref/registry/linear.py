"""linear: y = x·Wᵀ + b."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import absolute, cases
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, dot
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = normal(rng, dtype, z.n, z.t, z.c), normal(rng, dtype, z.f, z.c)
    return {"x": x, "w": w, "b": normal(rng, dtype, z.f)}


def equation(x: Array, w: Array, b: Array | None = None) -> Array:
    """y_o = Σ_i x_i·w_oi + b_o"""

    def entry(*at: int) -> Any:
        return dot(x[at[:-1]], w[at[-1]]) + (0 if b is None else b[at[-1]])

    return array((*x.shape[:-1], len(w)), entry)


def magnitude(dy: Array, res: Any, w: Array, b: Any = None) -> Array:
    return (absolute.rows(dy) @ np.abs(w)).reshape(*dy.shape[:-1], -1)


def magnitude_params(dy: Array, res: Any, w: Array, b: Any = None) -> tuple[Array, Array | None]:
    rows = absolute.rows(dy)
    return rows.T @ absolute.rows(res.x), None if b is None else rows.sum(axis=0)


def output_magnitude(x: Array, w: Array, b: Array | None = None) -> Array:
    y = np.abs(x) @ np.abs(w).T
    return y if b is None else y + np.abs(b)


def torch_twin(torch: Any, x: Any, w: Any, b: Any = None) -> Any:
    return torch.nn.functional.linear(x, w, b)


def functional_twin(fw: Namespace, x: Any, w: Any, b: Any = None) -> Any:
    y = x @ w.T
    return y if b is None else y + b


CASES = (
    OpCase("usual", "batch, bias, all axis lengths different"),
    OpCase("no_bias", "without a bias, as o, gate, up and down", change=cases.without_bias),
    OpCase("one_token", "one row", ONE_TOKEN),
    OpCase("nine_tokens", "one sequence of nine", cases.NINE),
    OpCase("one_by_one", "one input, one output", USUAL._replace(c=1, f=1)),
    OpCase("large", "x of hundreds", change=cases.times(x=256.0)),
    OpCase("tiny", "x of 1e-4", change=cases.times(x=2.0**-13), dtypes=cases.NO_HALF),
)

ROW = OpSpec(
    name="linear",
    forward=ops.linear,
    backward=ops.linear_bwd,
    backward_params=ops.linear_bwd_params,
    activations=("x",),
    parameters=("w", "b"),
    optional=("b",),
    sample=sample,
    reduction_length=lambda z: max(z.f, z.n * z.t),
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 2, "dx": 1, "dw": 1, "db": 1},
        forward_length=lambda z: z.c + 1,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
