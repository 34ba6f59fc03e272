"""Weights as plain arrays: the types computed in, and the numbers that training starts with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
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
