"""engine: mesp_ref itself as a client, in float32 or float64."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.api import loss, loss_and_grads, trace
from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.block import block, block_bwd
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import Model
from mesp_ref.engine.positions import first_keys
from mesp_ref.files.checkpoint import is_gain
from mesp_ref.files.config import config_of
from mesp_ref.files.models import load_model
from mesp_ref.files.peft import load_adapter
from mesp_ref.files.quantized import Quantized
from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.positions import tables
from mesp_ref.golden.rows import ROWS
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array, linear, linear_bwd, rope, rope_bwd
from mesp_ref.train.optim import SGD, AdamW

Arrays = dict[str, Array]
LAYER = "model.layers.0."


def compute_op(case: Case, given: Arrays) -> Arrays:
    spec = ROWS[case.attributes["op"]]
    attributes = {
        name: case.attributes[name] for name in spec.attributes if name in case.attributes
    }
    args: dict[str, Any] = dict.fromkeys(spec.optional) | given | attributes
    dy = args.pop("dy")
    y, res = spec.forward(**args)
    grads = {f"d{name}": grad for name, grad in spec.gradients(dy, res, args).items()}
    return {"y": np.asarray(y)} | grads


def compute_block(case: Case, given: Arrays) -> Arrays:
    at, found = case.attributes, Arrays()
    weights = {LAYER + name: array for name, array in given.items() if "." in name}
    adapter = Adapter(at["rank"], at["alpha"], ())
    for name in [name for name in weights if ".lora_" in name]:
        module, matrix = name.removesuffix(".weight").split(".lora_")
        adapter.weights[tensor_name(module, matrix)] = weights.pop(name)
    config = config_of(at["config"])
    for name in (name for name in weights if is_gain(name, config)):
        weights[name] = weights[name] + weights[name].dtype.type(config.traits.gain)
    first = first_keys(config, config.layer_type(0), 0, given["x"].shape[1], None)
    layer = Layer(0, config, weights, adapter, given["cos"], given["sin"], first)

    def tap(name: str, value: Array) -> None:
        found["y" if name == LAYER[:-1] else name.removeprefix(LAYER)] = value

    _, res = block(given["x"], layer._replace(tap=tap))
    dx, grads = block_bwd(given["dy"], res, layer._replace(tap=tap), params=True)
    del found["grad"]  # dy itself
    return found | {f"{n.split(LAYER)[1]}.grad": grad for n, grad in grads.items()} | {"dx": dx}


def load(case: Case, root: Path, dtype: str) -> tuple[Model, Adapter]:
    model = load_model(root / case.attributes["model"], dtype=dtype)
    adapter = load_adapter(root / case.attributes["adapter"], dtype=dtype, config=model.config)
    return model, adapter


def compute_model(case: Case, given: Arrays, root: Path, dtype: str) -> Arrays:
    return trace(*load(case, root, dtype), given["input_ids"], given["labels"])


def mezo_step(
    model: Model, adapter: Adapter, batch: tuple[Array, Array], z: Arrays, at: Any
) -> float:
    """Two forwards at w ± eps·z, then w −= lr·g·z in place; returns the mean of the two losses."""
    sides = []
    for move in (at["eps"], -at["eps"]):
        moved = {name: w + w.dtype.type(move) * z[name] for name, w in adapter.weights.items()}
        sides.append(loss(model, dataclasses.replace(adapter, weights=moved), *batch))
    g = (sides[0] - sides[1]) / (2 * at["eps"])
    for name, w in adapter.weights.items():
        w -= w.dtype.type(at["lr"] * g) * z[name]
    return (sides[0] + sides[1]) / 2


def compute_trajectory(case: Case, given: Arrays, root: Path, dtype: str) -> Arrays:
    """Steps of the trainer's optimisers, or of MeZO with the z of the case."""
    (model, adapter), at = load(case, root, dtype), case.attributes
    batch, losses, found = (given["input_ids"], given["labels"]), [], Arrays()
    sgd = SGD(at.get("weight_decay", 0.0), at.get("momentum", 0.0))
    adam = at["optimizer"] == "adamw"
    optimizer = AdamW((at["beta1"], at["beta2"]), at["eps"], at["weight_decay"]) if adam else sgd
    for number in range(at["steps"]):
        if at["optimizer"] == "mezo":
            z = {name: given[f"z/{name}"][number] for name in adapter.weights}
            losses.append(mezo_step(model, adapter, batch, z, at))
        else:
            value, grads = loss_and_grads(model, adapter, *batch)
            optimizer.step(adapter.weights, grads, at["lr"])
            losses.append(value)
        found |= {f"{n}.step_{number + 1}": w.copy() for n, w in adapter.weights.items()}
    wanted = {tensor.name for tensor in case.tensors}
    return {"loss": np.array(losses, dtype)} | {n: w for n, w in found.items() if n in wanted}


def compute_quantised(case: Case, given: Arrays, dtype: str) -> Arrays:
    at = case.attributes
    stored = np.dtype(ml_dtypes.bfloat16 if at["scale_dtype"] == "bfloat16" else np.float16)
    scales, biases = given["scales"].astype(stored), given["biases"].astype(stored)
    w = Quantized(given["packed"], scales, biases, at["bits"], np.dtype(dtype))[...]
    y, res = linear(given["x"], w)
    return {"w": w, "y": y, "dx": linear_bwd(given["dy"], res, w)}


def compute(case: Case, inputs: Arrays, root: Path, dtype: str) -> Arrays:
    """One case in `dtype`."""
    if dtype not in ("float32", "float64"):
        raise NotCovered
    given = {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for name, array in inputs.items()
    }
    if case.kind in ("op", "tile"):
        return compute_op(case, given)
    if case.kind == "block":
        return compute_block(case, given)
    if case.kind == "e2e":
        return compute_model(case, given, root, dtype)
    if case.kind == "traj":
        return compute_trajectory(case, given, root, dtype)
    if case.kind == "positions":
        at, d = case.attributes, given["x"].shape[-1]
        cos, sin = (
            t.astype(dtype) for t in tables(given["positions"], d, at["theta"], at["scaling"])
        )
        y, res = rope(given["x"], cos, sin)
        return {"y": y, "dx": rope_bwd(given["dy"], res, cos, sin)}
    if case.kind == "quant":
        return compute_quantised(case, given, dtype)
    raise NotCovered
