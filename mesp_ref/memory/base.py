"""How the frozen weights lie in their files, and what decoding them takes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import storage_dtype
from mesp_ref.files.quantized import Quantized, rows_at_once
from mesp_ref.files.safetensors import Stored

_GATE = "model.layers.0.mlp.gate_proj.weight"
_NORM = "model.norm.weight"


class Store(NamedTuple):
    """How one tensor lies in its file. The default needs no decoding: it is a view of the file."""

    dtype: str | None = None  # of its numbers, or of scales and biases; None: as computed with
    affine: Affine | None = None

    def _is_view(self, itemsize: int) -> bool:
        if self.affine or self.dtype is None:
            return self.affine is None
        return storage_dtype(self.dtype).itemsize == itemsize

    def decoded(self, *shape: int, itemsize: int) -> int:
        """Bytes of the tensor, or of a tile, once decoded; 0 where it is a view of the file."""
        return 0 if self._is_view(itemsize) else math.prod(shape) * itemsize

    def scratch(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes that decoding so many rows takes beside its result, see weights/quantized.py.

        For each of a chunk's numbers: four bits are unpacked into a byte by way of another; 16-bit
        scales need a float32 for the rounding; a group needs a scale. In float64 the decoded float32
        comes first.
        """
        if self.affine is None:
            return 0
        chunk = rows_at_once(rows, columns) * columns
        integer = 1 if self.affine.bits == 4 else 0
        rounding = 4 if self.dtype in ("float16", "bfloat16") else 0
        scales = 4 * chunk // self.affine.group_size
        wide = 0 if itemsize == 4 else 4 * chunk
        return max(2 * integer * chunk, (integer + rounding) * chunk + scales) + wide


class Base(NamedTuple):
    """The stores of the matrices in blocks, of the head, and of norms and biases.

    A checkpoint whose blocks differ is taken to be like its first gate_proj.
    """

    matrices: Store = Store()
    head: Store = Store()
    vectors: Store = Store()

    @classmethod
    def of(cls, weights: Mapping[str, Any], head: str) -> "Base":
        """The base of a model whose head is the tensor `head`."""
        return cls(*(_store(weights.get(name)) for name in (_GATE, head, _NORM)))

    @classmethod
    def uniform(cls, config: Qwen2Config, dtype: str, affine: Affine | None = None) -> "Base":
        """Every tensor in `dtype`, or packed where whole groups fill its rows.

        Raises MespRefError for an unknown type, and where no row consists of whole groups
        """
        name = storage_dtype(dtype).name
        dense = Store(name)
        if affine is None:
            return cls(dense, dense, dense)
        affine.shapes((1, config.hidden_size))
        return cls(Store(name, affine), Store(name, affine), dense)


def _store(table: Any) -> Store:
    if isinstance(table, Quantized):
        return Store(table.scales.dtype.name, Affine(table.bits, table.group_size))
    return Store(np.dtype(table.raw.dtype).name) if isinstance(table, Stored) else Store()
