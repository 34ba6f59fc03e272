"""head_loss: the end of a model from the last block's output: norm, head, mean cross entropy."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry import absolute, cases, cross_entropy, lm_loss, rmsnorm
from mesp_ref.registry.cases import OpCase
from mesp_ref.registry.draw import labels as draw_labels
from mesp_ref.registry.draw import normal
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace

SMALL = Sizes(n=2, t=4, c=5, v=7)


def forward(
    x: Array, w: Array, head: Array, labels: Array, *, eps: float
) -> tuple[Array, tuple[ops.RmsNormRes, Any]]:
    """The engine's norm and lm_loss."""
    n, norm = ops.rmsnorm(x, w, eps=eps)
    loss, res = ops.lm_loss(n, head, labels)
    return loss, (norm, res)


def backward(dy: Array, res: Any, w: Array, head: Array, *, eps: float) -> Array:
    return ops.rmsnorm_bwd(ops.lm_loss_bwd(dy, res[1], head), res[0], w, eps=eps)


def backward_params(
    dy: Array, res: Any, w: Array, head: Array, *, eps: float
) -> tuple[Array, Array]:
    dn = ops.lm_loss_bwd(dy, res[1], head)
    dw = ops.rmsnorm_bwd_params(dn, res[0], w, eps=eps)
    return dw, ops.lm_loss_bwd_params(dy, res[1], head)


def _logits(x: Array, w: Array, head: Array, eps: float) -> tuple[Array, Array, Array]:
    """Logits of each row, mag of what the head reads, and of the logits."""
    mag = absolute.rows(rmsnorm.output_magnitude(x, w, eps))
    unit = rmsnorm.output_magnitude(x, np.ones_like(w), eps) * np.sign(x)
    return (unit * w).reshape(-1, len(w)) @ head.T, mag, mag @ np.abs(head).T


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """Through softmax, head and norm; for a backend that keeps each row's lse (cross_entropy.by_lse)."""
    x, w, head, labels, eps = (args[n] for n in ("x", "w", "head", "labels", "eps"))
    rows, (logits, mag_n, mag) = labels.reshape(-1), _logits(x, w, head, eps)
    dz = cross_entropy.dlogits(logits, rows, mag) + cross_entropy.by_lse(logits, rows)
    dz = np.abs(dy) * dz
    dn, norm = (dz @ np.abs(head)).reshape(x.shape), ops.RmsNormRes(x)
    return {
        "x": rmsnorm.magnitude(dn, norm, w, eps=eps),
        "w": rmsnorm.magnitude_params(dn, norm, w, eps=eps),
        "head": dz.T @ mag_n,
    }


def magnitude(dy: Array, res: Any, w: Array, head: Array, *, eps: float) -> Array:
    args = {"x": res[0].x, "w": w, "head": head, "labels": res[1].labels, "eps": eps}
    return gradient_magnitudes(dy, args)["x"]


def magnitude_params(
    dy: Array, res: Any, w: Array, head: Array, *, eps: float
) -> tuple[Array, Array]:
    args = {"x": res[0].x, "w": w, "head": head, "labels": res[1].labels, "eps": eps}
    found = gradient_magnitudes(dy, args)
    return found["w"], found["head"]


def output_magnitude(x: Array, w: Array, head: Array, labels: Array, eps: float) -> Array:
    logits, _, mag = _logits(x, w, head, eps)
    return cross_entropy.output_magnitude(logits, labels.reshape(-1), mag)


def equation(x: Array, w: Array, head: Array, labels: Array, eps: Any) -> Array:
    """lm_loss of rmsnorm(x)"""
    return lm_loss.equation(rmsnorm.equation(x, w, eps), head, labels)


def torch_twin(torch: Any, x: Any, w: Any, head: Any, labels: Any, eps: float) -> Any:
    return lm_loss.torch_twin(torch, rmsnorm.torch_twin(torch, x, w, eps), head, labels)


def functional_twin(fw: Namespace, x: Any, w: Any, head: Any, labels: Any, eps: float) -> Any:
    return lm_loss.functional_twin(fw, rmsnorm.functional_twin(fw, x, w, eps), head, labels)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args = rmsnorm.sample(rng, z, dtype) | {"head": 0.5 * normal(rng, dtype, z.v, z.c)}
    return args | {"labels": draw_labels(rng, z, z.n * z.t).reshape(z.n, z.t)}


CASES = (
    OpCase("usual", "every third label ignored; each row's label is its own: none is shifted", SMALL),
    OpCase("none_ignored", "every row counts", SMALL, cases.every("labels")),
    OpCase("all_ignored", "loss 0, gradients exactly 0", SMALL, cases.put(labels=IGNORED)),
    OpCase("small_inputs", "x of 2⁻⁷: eps decides", SMALL._replace(n=1), cases.times(x=2.0**-7)),
    OpCase("one_token", "one row", SMALL._replace(n=1, t=1), cases.every("labels")),
)  # fmt: skip

ROW = OpSpec(
    name="head_loss",
    forward=forward,
    backward=backward,
    backward_params=backward_params,
    activations=("x",),
    parameters=("w", "head"),
    constants=("labels",),
    attributes=("eps",),
    sample=sample,
    reduction_length=lambda z: max(z.v, z.n * z.t) + 2 * z.c,
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 7, "dx": 13, "dw": 11, "dhead": 8},
        forward_length=lambda z: 2 * z.c + z.v + z.n * z.t,
        output_magnitude=output_magnitude,
        gradient_magnitudes=gradient_magnitudes,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
