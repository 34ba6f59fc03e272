"""lm_loss: the head and its cross entropy; in one tile of the vocabulary, and in several."""

from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry import absolute, cases, cross_entropy, linear
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import labels as draw_labels
from mesp_ref.registry.draw import normal
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = normal(rng, dtype, z.n, z.t, z.c), normal(rng, dtype, z.v, z.c)
    return {"x": x, "w": w, "labels": draw_labels(rng, z, z.n * z.t).reshape(z.n, z.t)}


def equation(x: Array, w: Array, labels: Array) -> Array:
    """cross_entropy of x·Wᵀ"""
    logits = linear.equation(x, w)
    return cross_entropy.equation(logits.reshape(-1, len(w)), labels.reshape(-1))


def _head(res: Any, w: Array) -> Array:
    mag = absolute.rows(res.x) @ np.abs(w).T
    logits = res.x.reshape(-1, res.x.shape[-1]) @ w.T
    return cross_entropy.dlogits(logits, res.labels.reshape(-1), mag)


def magnitude(dloss: Any, res: Any, w: Any) -> Array:
    w = _whole(w)
    return (abs(dloss) * _head(res, w) @ np.abs(w)).reshape(res.x.shape)


def magnitude_params(dloss: Any, res: Any, w: Any) -> Array:
    return abs(dloss) * _head(res, _whole(w)).T @ absolute.rows(res.x)


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """As `magnitude`, for a backend that keeps each row's lse (see cross_entropy.by_lse)."""
    x, w = args["x"].reshape(-1, args["x"].shape[-1]), args["w"]
    more = np.abs(dy) * cross_entropy.by_lse(x @ w.T, args["labels"].reshape(-1))
    found = ROW.magnitudes(dy, args)
    dx = (more @ np.abs(w)).reshape(found["x"].shape)
    return {"x": found["x"] + dx, "w": found["w"] + more.T @ np.abs(x)}


def _whole(w: Any) -> Array:
    """A weight as one array."""
    return np.asarray(w[...])


def output_magnitude(x: Array, w: Array, labels: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    mag = linear.output_magnitude(rows, w)
    return cross_entropy.output_magnitude(rows @ w.T, labels.reshape(-1), mag)


def torch_twin(torch: Any, x: Any, w: Any, labels: Any) -> Any:
    logits = torch.nn.functional.linear(x, w).flatten(0, 1)
    return cross_entropy.torch_twin(torch, logits, labels.flatten())


def functional_twin(fw: Namespace, x: Any, w: Any, labels: Any) -> Any:
    logits = linear.functional_twin(fw, x, w).reshape(-1, len(w))
    return cross_entropy.functional_twin(fw, logits, labels.reshape(-1))


def _half(args: Args) -> Args:
    return args | {"x": args["x"] * 0.5}


CASES = (
    OpCase("usual", "every third label ignored", change=_half),
    OpCase("none_ignored", "every row counts",
           change=lambda args: cases.every("labels")(_half(args))),
    OpCase("all_ignored", "loss 0, gradients exactly 0", change=cases.put(labels=IGNORED)),
    OpCase("label_0_counts", "token id 0 is no padding", USUAL._replace(n=1),
           lambda args: cases.put(labels=0)(_half(args))),
    OpCase("one_token", "one row", ONE_TOKEN, cases.every("labels")),
    OpCase("confident", "logits of tens", USUAL._replace(n=1), cases.times(x=8.0), cases.WIDE),
)  # fmt: skip

ROW = OpSpec(
    name="lm_loss",
    forward=ops.lm_loss,
    backward=ops.lm_loss_bwd,
    backward_params=ops.lm_loss_bwd_params,
    activations=("x",),
    parameters=("w",),
    constants=("labels",),
    attributes=("width",),
    droppable=("dx",),
    sample=sample,
    reduction_length=lambda z: max(z.v, z.n * z.t) + z.c,
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 4, "dx": 5, "dw": 5},
        forward_length=lambda z: z.c + z.v + z.n * z.t,
        output_magnitude=output_magnitude,
        gradient_magnitudes=gradient_magnitudes,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

TILED = replace(
    ROW,
    name="tiled_lm_loss",
    sample=lambda rng, z, dtype: sample(rng, z, dtype) | {"width": 2},
    golden=None,
)
