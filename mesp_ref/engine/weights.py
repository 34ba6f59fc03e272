"""The weight protocol that block and model know, and its simplest source: a dictionary."""

from collections.abc import Iterable
from typing import Any, Protocol

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


class Weights(Protocol):
    """Where a model's arrays come from.

    `W(name)` is the whole tensor in the compute dtype. `W.rows` and `W.cols` are tiles of it and
    `W.lazy(name)` a table that decodes what it is indexed with. Callers never keep what they get
    beyond the op they pass it to, so a decoded weight dies when that op returns.
    """

    dtype: np.dtype

    def __call__(self, name: str) -> Array: ...
    def __contains__(self, name: str) -> bool: ...
    def lazy(self, name: str) -> Any: ...
    def rows(self, name: str, a: int, b: int) -> Array: ...
    def cols(self, name: str, a: int, b: int) -> Array: ...
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


class LazyWeights:
    """The protocol over `tables`: anything per name that can be indexed and has a shape."""

    def __init__(self, tables: dict[str, Any], dtype: np.dtype):
        self.tables, self.dtype = tables, dtype

    def __call__(self, name: str) -> Array:
        table: Array = self.tables[name][...]
        return table

    def __contains__(self, name: str) -> bool:
        return name in self.tables

    def lazy(self, name: str) -> Any:
        """What answers `[ids]` with rows in the compute dtype."""
        return self.tables[name]

    def rows(self, name: str, a: int, b: int) -> Array:
        """Rows a … b−1 (output features)."""
        tile: Array = self.tables[name][a:b]
        return tile

    def cols(self, name: str, a: int, b: int) -> Array:
        """Columns a … b−1 (input features)."""
        tile: Array = self.tables[name][:, a:b]
        return tile

    def names(self) -> Iterable[str]:
        return self.tables.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tables[name].shape)


class ArrayWeights(LazyWeights):
    """Weights that are plain arrays in memory: writable, so that every one can be trained."""

    def __init__(self, arrays: dict[str, Array]):
        super().__init__(arrays, next(iter(arrays.values())).dtype)
        self.arrays = arrays


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
