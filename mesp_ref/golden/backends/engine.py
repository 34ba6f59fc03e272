"""engine: mesp_ref itself as a client, in float32 or float64. Trajectories are not covered."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.block import Layer, block, block_bwd
from mesp_ref.config import Qwen2Config
from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.suite import Case
from mesp_ref.gradients import trace
from mesp_ref.loading import load_model
from mesp_ref.lora import Adapter, load_adapter, tensor_name
from mesp_ref.ops import Array, linear, linear_bwd
from mesp_ref.registry import OPS
from mesp_ref.weights import ArrayWeights
from mesp_ref.weights.quantized import Quantized

Arrays = dict[str, Array]
LAYER = "model.layers.0."


def compute_op(case: Case, given: Arrays) -> Arrays:
    spec = OPS[case.attributes["op"]]
    attributes = {name: case.attributes[name] for name in spec.attributes}
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
    config = Qwen2Config.from_dict(at["config"])
    layer = Layer(0, config, ArrayWeights(weights), adapter, given["cos"], given["sin"])

    def tap(name: str, value: Array) -> None:
        found["y" if name == LAYER[:-1] else name.removeprefix(LAYER)] = value

    res: dict[str, Any] = {}
    block(given["x"], layer, res=res, tap=tap)
    dx, grads = block_bwd(given["dy"], res, layer, params=True, tap=tap)
    del found["grad"]  # dy itself
    return found | {f"{n.split(LAYER)[1]}.grad": grad for n, grad in grads.items()} | {"dx": dx}


def compute_model(case: Case, given: Arrays, root: Path, dtype: str) -> Arrays:
    model = load_model(root / case.attributes["model"], dtype=dtype)
    adapter = load_adapter(root / case.attributes["adapter"], dtype=dtype, config=model.config)
    return trace(model, adapter, given["input_ids"], given["labels"])


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
    if case.kind == "op":
        return compute_op(case, given)
    if case.kind == "block":
        return compute_block(case, given)
    if case.kind == "e2e":
        return compute_model(case, given, root, dtype)
    if case.kind == "quant":
        return compute_quantised(case, given, dtype)
    raise NotCovered
