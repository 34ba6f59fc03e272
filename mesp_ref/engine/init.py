"""What a run starts with: fresh LoRA matrices and weights, checked against the model they are for."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.ops import Array

_COMPUTE = ("float32", "float64", "complex128")


def compute_dtype(dtype: Any) -> np.dtype:
    """float32, float64 or complex128 as a NumPy dtype.

    Raises MespRefError for anything else: 16-bit types are for storage, decoded at use.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _COMPUTE:
        raise MespRefError(f"dtype: found {dtype!s}, expected one of {', '.join(_COMPUTE)}")
    return found


def parse_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """ "all", "q_proj,v_proj" or an iterable of names, in the order of a block.

    Raises MespRefError for a name that is not one of the seven projections, and for none at all.
    """
    if isinstance(targets, str):
        targets = PROJECTIONS if targets in ("all", "all-linear") else targets.split(",")
    asked = [name.strip() for name in targets]
    for name in asked:
        if name not in PROJECTIONS:
            raise MespRefError(
                f"targets: found {name!r}, expected 'all' or names among {', '.join(PROJECTIONS)}"
            )
    if not asked:
        raise MespRefError("targets: found none, expected 'all' or at least one projection")
    return tuple(name for name in PROJECTIONS if name in asked)


def check_rank(rank: object, alpha: object, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MespRefError(f"{where}: found {shown(rank)}, expected a rank of 1 or more")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise MespRefError(f"{where}: alpha: found {shown(alpha)}, expected a finite number")


def adapter_shapes(
    config: Qwen2Config, rank: int, targets: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """PEFT name and shape of every LoRA matrix, block by block: A [R, in], B [out, R]."""
    weights, targets = config.weight_shapes(), set(targets)
    shapes = {}
    for i in range(config.num_hidden_layers):
        for target, path in PROJECTIONS.items():
            if target in targets:
                module = f"model.layers.{i}.{path}"
                out_features, in_features = weights[f"{module}.weight"]
                shapes[tensor_name(module, "A")] = (rank, in_features)
                shapes[tensor_name(module, "B")] = (out_features, rank)
    return shapes


def init_lora(
    config: Qwen2Config,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = "all",
    seed: int = 0,
    b_std: float = 0.0,
    use_rslora: bool = False,
    dtype: Any = "float32",
) -> Adapter:
    """A fresh adapter as PEFT initialises it: A uniform in ±1/√in, B zero.

    B = 0 makes the adapted model equal to its base and dA exactly 0; `b_std` > 0 draws B from
    normal(0, b_std) for checks in which every gradient must be alive.

    Raises MespRefError for a rank below 1, alpha not finite or unknown targets.
    Source    PEFT LoraLayer.reset_lora_parameters: kaiming_uniform(a=√5) is uniform ±1/√in
    """
    check_rank(rank, alpha, "rank")
    wanted, names = compute_dtype(dtype), parse_targets(targets)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in adapter_shapes(config, rank, names).items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(shape[1])
            weights[name] = rng.uniform(-bound, bound, shape).astype(wanted)
        else:
            weights[name] = (rng.standard_normal(shape) * b_std).astype(wanted)
    return Adapter(rank, float(alpha), names, use_rslora, weights)


def check_adapter(adapter: Adapter, config: Qwen2Config, where: str = "adapter") -> None:
    """Raise MespRefError when a LoRA matrix does not fit the model: another shape or layer."""
    expected = adapter_shapes(config, adapter.rank, adapter.targets)
    for name, array in adapter.weights.items():
        if array.shape != expected.get(name):
            raise MespRefError(
                f"{where}: {name}: found {list(array.shape)}, expected "
                f"{list(expected[name]) if name in expected else 'no such tensor'} "
                f"for {config.source}; the adapter belongs to another model"
            )


def random_arrays(
    config: Qwen2Config, *, seed: int = 0, dtype: Any = "float32", std: float = 0.02
) -> dict[str, Array]:
    """Seeded weights as a training run starts with: normal(0, std), norms 1, biases 0.

    Source    initializer_range of Hugging Face's Qwen2; drawn in the order of weight_shapes
    """
    rng = np.random.default_rng(seed)
    wanted = compute_dtype(dtype)
    arrays = {}
    for name, shape in config.weight_shapes().items():
        if name.endswith("norm.weight"):
            arrays[name] = np.ones(shape, wanted)
        elif name.endswith(".bias"):
            arrays[name] = np.zeros(shape, wanted)
        else:
            arrays[name] = (rng.standard_normal(shape) * std).astype(wanted)
    return arrays


def arrays_in_memory(weights: Mapping[str, Any], what: str) -> dict[str, Array]:
    """The weights themselves, where all of them are writable arrays.

    Raises MespRefError for mapped ones, which can be read only
    """
    arrays = {n: w for n, w in weights.items() if isinstance(w, np.ndarray) and w.flags.writeable}
    if len(arrays) < len(weights):
        raise MespRefError(
            f"model: found mapped read-only weights, expected arrays in memory for {what}; pass "
            "mr.read_into_memory(model)"
        )
    return arrays
