"""embedding: rows of a table."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    ids = rng.integers(0, (z.v + 1) // 2, (z.n, z.t))  # half the table: some rows repeat
    return {"ids": ids, "w": normal(rng, dtype, z.v, z.c)}


def equation(ids: Array, w: Array) -> Array:
    """y_t = w[ids_t]"""
    return array((*ids.shape, w.shape[1]), lambda *at: w[ids[at[:-1]], at[-1]])


def magnitude_params(dy: Array, res: Any, w: Any) -> Array:
    dw = np.zeros(w.shape, dy.dtype)
    np.add.at(dw, res.ids, np.abs(dy))
    return dw


def output_magnitude(ids: Array, w: Array) -> Array:
    return np.abs(w[ids])


def torch_twin(torch: Any, ids: Any, w: Any) -> Any:
    return torch.nn.functional.embedding(ids, w)


def functional_twin(fw: Namespace, ids: Any, w: Any) -> Any:
    return w[ids]


CASES = (
    OpCase("usual", "some tokens repeat"),
    OpCase("one_word", "one token everywhere: its row collects all", change=cases.put(ids=3)),
    OpCase("distinct", "no token repeats", USUAL._replace(n=1, t=5), cases.every("ids")),
    OpCase("one_token", "one row", ONE_TOKEN),
)

ROW = OpSpec(
    name="embedding",
    forward=ops.embedding,
    backward_params=ops.embedding_bwd_params,
    parameters=("w",),
    constants=("ids",),
    sample=sample,
    reduction_length=lambda z: z.n * z.t,
    equation=equation,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 0, "dw": 3},
        forward_length=lambda z: 0,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)
