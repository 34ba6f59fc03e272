"""A model with its adapter and a batch as one function of all its tensors: the loss."""

from typing import Any, cast

import numpy as np

from mesp_ref import ops
from mesp_ref.api import loss, loss_and_grads
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.files.safetensors import Stored
from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args
from mesp_ref.verify import equations
from mesp_ref.verify.planted import planted
from mesp_ref.verify.subject import Arrays, Subject

# The magnitudes of plain ops by the path of the backward whose place they take.
_YARDSTICKS = {
    f"ops:{name}": magnitude
    for row in OPS.values()
    for backward, magnitude in (
        (row.backward, row.magnitude),
        (row.backward_params, row.magnitude_params),
    )
    for name, function in vars(ops).items()
    if magnitude is not None and function is backward
}


def assemble(model: Model, adapter: Adapter | None, tensors: Args) -> tuple[Model, Adapter | None]:
    """The model with `tensors` in the place of its own; everything else is cast at use."""
    dtype = np.result_type(*tensors.values())
    tables: dict[str, Any] = {n: Stored(cast(Array, w), dtype) for n, w in model.weights.items()}
    own = {name: tensors[name] for name in tables if name in tensors}
    lora = None if adapter is None else adapter.astype(dtype)
    if lora is not None:
        lora.weights.update({n: a for n, a in tensors.items() if n in lora.weights})
    return Model(model.config, tables | own, model.path), lora


def model_subject(
    model: Model, adapter: Adapter | None, ids: Array, labels: Array,
    *, method: str = "mesp", trainable: str = "all",
) -> Subject:  # fmt: skip
    """The loss of a batch at the float64 values of every trainable tensor.

    The backward hands each block's gradients to a callback that overwrites that block's parameters,
    as an optimiser may: a method that still needs the old ones is found out.
    """
    tensors = {} if adapter is None else dict(adapter.weights)
    if trainable == "all":
        tensors |= {name: model.weights[name][...] for name in model.weights}
    args = {name: np.array(array, np.float64) for name, array in tensors.items()}

    def placed(args: Args) -> tuple[Model, Adapter | None]:
        return assemble(model, adapter, {name: args[name] for name in tensors})

    def forward(args: Args) -> Arrays:
        return (np.asarray(loss(*placed(args), ids, labels)),)

    def gradients(args: Args, method: str, overwrite: bool) -> dict[str, Array]:
        point = {name: args[name].copy() for name in tensors}
        grads: dict[str, Array] = {}

        def collect(block: int, found: dict[str, Array]) -> None:
            grads.update({name: np.array(grad) for name, grad in found.items()})
            for name in found if overwrite else ():
                point[name] += 1

        options: Args = {"method": method, "trainable": trainable, "on_gradients": collect}
        loss_and_grads(*placed(point), ids, labels, **options)
        return grads

    def backward(dys: Arrays, args: Args) -> dict[str, Array]:
        return {name: dys[0] * grad for name, grad in gradients(args, method, True).items()}

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        with planted(_YARDSTICKS):
            grads = gradients(args, "store_all", False)
        return {name: np.abs(dys[0]) * grad for name, grad in grads.items()}

    name, scale = f"model by {method}", 0.0 if adapter is None else adapter.scale
    given: Args = {"config": model.config, "ids": ids, "labels": labels, "s": scale}
    return Subject(name, args | given, tuple(args), forward, backward, magnitude, equations.model)
