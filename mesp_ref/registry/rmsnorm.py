"""rmsnorm: y = w·x/√(mean(x²) + eps)."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import absolute, cases
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, dot, sqrt
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace, torch_wide, wide


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = normal(rng, dtype, z.n, z.t, z.c), normal(rng, dtype, z.c)
    return {"x": x, "w": w, "eps": 1e-2}  # large enough that a misplaced eps shows


def equation(x: Array, w: Array, eps: Any) -> Array:
    """y_c = w_c·x_c / sqrt((1/C)·Σ x² + eps)"""

    def entry(*at: int) -> Any:
        row = x[at[:-1]]
        return w[at[-1]] * x[at] / sqrt(dot(row, row) / len(row) + eps)

    return array(x.shape, entry)


def _inverse_rms(x: Array, eps: float) -> Array:
    return 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def magnitude(dy: Array, res: Any, w: Array, *, eps: float) -> Array:
    x, r, u = np.abs(res.x), _inverse_rms(res.x, eps), np.abs(dy * w)
    return u * r + x * (u * x).mean(axis=-1, keepdims=True) * r**3


def magnitude_params(dy: Array, res: Any, w: Array, *, eps: float) -> Array:
    y = absolute.rows(res.x * _inverse_rms(res.x, eps)).reshape(dy.shape)
    return (np.abs(dy) * y).reshape(-1, len(w)).sum(axis=0)


def output_magnitude(x: Array, w: Array, eps: float) -> Array:
    return np.abs(x * w) / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def torch_twin(torch: Any, x: Any, w: Any, eps: float) -> Any:
    z, weight = torch_wide(torch, x), torch_wide(torch, w)
    return torch.nn.functional.rms_norm(z, (x.shape[-1],), weight, eps).to(x.dtype)


def functional_twin(fw: Namespace, x: Any, w: Any, eps: float) -> Any:
    z = wide(fw, x)
    n = fw.xp.sqrt((z * z).mean(-1, keepdims=True) + eps)
    return (wide(fw, w) * z / n).astype(x.dtype)


CASES = (
    OpCase("usual", "eps = 0.01, so that a misplaced eps shows"),
    OpCase("eps_1e-6", "the eps of Qwen2.5", change=cases.put(eps=1e-6)),
    OpCase("one_channel", "C = 1: dx nearly cancels", USUAL._replace(c=1)),
    OpCase("zero_row", "one token is 0: n = √eps", change=cases.at("x", (0, 1), 0.0)),
    OpCase("tiny", "eps dominates x", change=cases.times(x=2.0**-12), dtypes=cases.NO_HALF),
    OpCase("large", "x of thousands; its square leaves float16's range",
           change=cases.times(x=2048.0)),
    OpCase("outlier", "one channel 500 times the others",
           change=cases.at("x", (..., 2), 500.0)),
    OpCase("negative_weight", "w < 0", change=cases.times(w=-1.0)),
    OpCase("one_token", "one row", ONE_TOKEN),
    OpCase("nine_tokens", "one sequence of nine", cases.NINE),
)  # fmt: skip

ROW = OpSpec(
    name="rmsnorm",
    forward=ops.rmsnorm,
    backward=ops.rmsnorm_bwd,
    backward_params=ops.rmsnorm_bwd_params,
    activations=("x",),
    parameters=("w",),
    attributes=("eps",),
    sample=sample,
    reduction_length=lambda z: max(z.c, z.n * z.t),
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 3, "dx": 5, "dw": 3},
        forward_length=lambda z: z.c,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
