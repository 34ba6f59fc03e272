"""MLX: the shared forward on mlx.core, gradients by mx.vjp. On Linux: pip install 'mlx[cpu]'."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mesp_ref.golden.backends import functional
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array


class Mlx:
    """See functional.Framework."""

    xp = mx
    dtypes = MappingProxyType(
        {name: getattr(mx, name) for name in ("float32", "float16", "bfloat16")}
    )

    def vjp(self, f: Callable[..., Any], primals: list[Any], cotangent: Any) -> list[Any]:
        return list(mx.vjp(f, primals, [cotangent])[1])

    silu = staticmethod(nn.silu)

    def softmax(self, x: Any) -> Any:
        return mx.softmax(x, axis=-1)

    def logsumexp(self, x: Any) -> Any:
        return mx.logsumexp(x, axis=-1)

    def numpy(self, x: Any) -> Array:
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(x)


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case in `dtype`; float64 is not covered."""
    return functional.compute(Mlx(), case, inputs, root, dtype)
