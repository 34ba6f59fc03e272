"""A model with its adapter and a batch as one function of all its tensors: the loss."""

import itertools
from collections.abc import Iterator
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


def run_step(
    model: Model, adapter: Adapter | None, ids: Array, labels: Array, tensors: Args,
    *, overwrite: bool, **options: Any,
) -> tuple[float, dict[str, Array]]:  # fmt: skip
    """Loss and gradients with `tensors` in the place of the model's and the adapter's.

    With `overwrite` a callback overwrites each block's parameters as soon as it has their gradients,
    as an optimiser may.
    """
    grads: dict[str, Array] = {}

    def collect(block: int, found: dict[str, Array]) -> None:
        grads.update({name: np.array(grad) for name, grad in found.items()})
        for name in found if overwrite else ():
            tensors[name] += 1

    placed = assemble(model, adapter, tensors)
    value, _ = loss_and_grads(*placed, ids, labels, on_gradients=collect, **options)
    return value, grads


def loss_apart(
    model: Model, adapter: Adapter | None, ids: Array, labels: Array, position_ids: Array | None
) -> Any:
    """The loss of a batch; of packed rows that of their documents, each run by itself.

    Σ n_d·L_d / Σ n_d over documents d with n_d targets: no mask and no position of the packed forward
    has a part in it.
    """
    if position_ids is None:
        return loss(model, adapter, ids, labels)
    total, count = 0.0, 0
    for row, a, b in documents(position_ids):
        targets = int((labels[row, a + 1 : b] != ops.IGNORED).sum())
        if targets:
            alone = ids[row : row + 1, a:b], labels[row : row + 1, a:b]
            total, count = total + targets * loss(model, adapter, *alone), count + targets
    return total / count


def documents(position_ids: Array) -> Iterator[tuple[int, int, int]]:
    """Row, begin and end of each document of packed rows."""
    for row, places in enumerate(position_ids):
        for a, b in itertools.pairwise([*np.flatnonzero(places == 0).tolist(), len(places)]):
            yield row, a, b


def model_subject(
    model: Model, adapter: Adapter | None, ids: Array, labels: Array, *, method: str = "mesp",
    trainable: str = "all", position_ids: Array | None = None, **options: Any,
) -> Subject:  # fmt: skip
    """The loss of a batch at the float64 values of every trainable tensor.

    The backward overwrites each block's parameters when it has their gradients: a method that still
    needs the old ones is found out. `options` are those of loss_and_grads. Of rows with position_ids
    the forward is that of their documents apart.
    """
    tensors = {} if adapter is None else dict(adapter.weights)
    if trainable == "all":
        tensors |= {name: model.weights[name][...] for name in model.weights}
    args = {name: np.array(array, np.float64) for name, array in tensors.items()}

    def placed(args: Args) -> tuple[Model, Adapter | None]:
        return assemble(model, adapter, {name: args[name] for name in tensors})

    def forward(args: Args) -> Arrays:
        return (np.asarray(loss_apart(*placed(args), ids, labels, position_ids)),)

    def gradients(args: Args, overwrite: bool, **options: Any) -> dict[str, Array]:
        point = {name: args[name].copy() for name in tensors}
        given = model, adapter, ids, labels, point
        options |= {"trainable": trainable, "position_ids": position_ids}
        return run_step(*given, overwrite=overwrite, **options)[1]

    def backward(dys: Arrays, args: Args) -> dict[str, Array]:
        grads = gradients(args, True, method=method, **options)
        return {name: dys[0] * grad for name, grad in grads.items()}

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        with planted(_YARDSTICKS):
            grads = gradients(args, False, method="store_all")
        return {name: np.abs(dys[0]) * grad for name, grad in grads.items()}

    name, scale = f"model by {method}", 0.0 if adapter is None else adapter.scale
    given: Args = {"config": model.config, "ids": ids, "labels": labels, "s": scale}
    equation = equations.model if position_ids is None else None
    return Subject(name, args | given, tuple(args), forward, backward, magnitude, equation)
