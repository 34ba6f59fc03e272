"""add_norm: y = [norm(a), a], a = x + f: what a half gives, added to the stream and normalised."""

from typing import Any, NamedTuple

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import absolute, cases, rmsnorm
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


class AddNormRes(NamedTuple):
    """Residuals of add_norm: the two that were added, and their sum."""

    x: Array
    f: Array
    a: Array


def forward(x: Array, f: Array, w: Array, *, eps: float) -> tuple[Array, AddNormRes]:
    """The engine's sum and norm, side by side in the last axis."""
    a = x + f
    return np.concatenate([ops.rmsnorm(a, w, eps=eps)[0], a], axis=-1), AddNormRes(x, f, a)


def backward(dy: Array, res: AddNormRes, w: Array, *, eps: float) -> tuple[Array, Array]:
    """dx = df = norm_bwd(dn) + da: both read the sum."""
    dn, da = np.split(dy, 2, axis=-1)
    dx = ops.rmsnorm_bwd(dn, ops.RmsNormRes(res.a), w, eps=eps) + da
    return dx, dx


def backward_params(dy: Array, res: AddNormRes, w: Array, *, eps: float) -> Array:
    dn, _ = np.split(dy, 2, axis=-1)
    return ops.rmsnorm_bwd_params(dn, ops.RmsNormRes(res.a), w, eps=eps)


def _mean(x: Array) -> Array:
    found: Array = x.mean(axis=-1, keepdims=True)
    return found


def _sizes(x: Array, f: Array, eps: float) -> tuple[Array, Array, Array]:
    """|a|, mag of a, and 1/n."""
    a = x + f
    return np.abs(a), np.abs(x) + np.abs(f), 1 / np.sqrt(_mean(a * a) + eps)


def _unit(a: Array, mag: Array, r: Array) -> Array:
    """mag of a/n, the rounding of the sum a in it."""
    found: Array = mag * r + a * _mean(a * mag) * r**3
    return found


def magnitude(dy: Array, res: AddNormRes, w: Array, *, eps: float) -> tuple[Array, Array]:
    """The norm's backward, and to first order what the rounding of a moves in it."""
    (dn, da), (a, mag, r) = np.split(np.abs(dy), 2, axis=-1), _sizes(res.x, res.f, eps)
    u = dn * np.abs(w)
    along, moved = _mean(u * a), _mean(a * mag)
    dx = u * (r + moved * r**3) + mag * along * r**3
    dx = dx + a * (along + _mean(u * mag)) * r**3 + 3 * a * along * moved * r**5
    return dx + da, dx + da


def magnitude_params(dy: Array, res: AddNormRes, w: Array, *, eps: float) -> Array:
    dn, _ = np.split(np.abs(dy), 2, axis=-1)
    return absolute.rows(dn * _unit(*_sizes(res.x, res.f, eps))).sum(axis=0)


def output_magnitude(x: Array, f: Array, w: Array, eps: float) -> Array:
    a, mag, r = _sizes(x, f, eps)
    return np.concatenate([np.abs(w) * _unit(a, mag, r), mag], axis=-1)


def equation(x: Array, f: Array, w: Array, eps: Any) -> Array:
    """rmsnorm of a = x + f, and a"""
    a = x + f
    return np.concatenate([rmsnorm.equation(a, w, eps), a], axis=-1)


def torch_twin(torch: Any, x: Any, f: Any, w: Any, eps: float) -> Any:
    a = x + f
    return torch.cat([rmsnorm.torch_twin(torch, a, w, eps), a], dim=-1)


def functional_twin(fw: Namespace, x: Any, f: Any, w: Any, eps: float) -> Any:
    a = x + f
    return fw.xp.concatenate([rmsnorm.functional_twin(fw, a, w, eps), a], axis=-1)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args = rmsnorm.sample(rng, z, dtype)
    return {"x": args["x"], "f": normal(rng, dtype, z.n, z.t, z.c), "w": args["w"], "eps": 1e-2}


def _cancels(args: Args) -> Args:
    """f takes nearly all of x away."""
    return args | {"f": args["x"] * -0.9375}


CASES = (
    OpCase("usual", "y is norm(x + f) and x + f, side by side", USUAL),
    OpCase("cancels", "f = −15/16·x: little is left of the sum", USUAL, _cancels),
    OpCase("stream", "x of hundreds beside f of ones: a residual stream deep in a model", USUAL,
           cases.times(x=256.0)),
    OpCase("nothing_added", "f = 0", USUAL, cases.put(f=0.0)),
    OpCase("one_token", "one row", ONE_TOKEN),
)  # fmt: skip

ROW = OpSpec(
    name="add_norm",
    forward=forward,
    backward=backward,
    backward_params=backward_params,
    activations=("x", "f"),
    parameters=("w",),
    attributes=("eps",),
    sample=sample,
    reduction_length=lambda z: max(z.c, z.n * z.t),
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 4, "dx": 7, "df": 7, "dw": 4},
        forward_length=lambda z: z.c,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
