"""JAX: the shared forward on jax.numpy, gradients by jax.vjp."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesp_ref.golden.backends import functional
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array


class Jax:
    """See functional.Framework."""

    xp = jnp
    dtypes = MappingProxyType(
        {name: getattr(jnp, name) for name in ("float64", "float32", "float16", "bfloat16")}
    )

    def vjp(self, f: Callable[..., Any], primals: list[Any], cotangent: Any) -> list[Any]:
        return list(jax.vjp(f, *primals)[1](cotangent))

    silu = staticmethod(jax.nn.silu)
    softmax = staticmethod(jax.nn.softmax)

    def logsumexp(self, x: Any) -> Any:
        return jax.nn.logsumexp(x, axis=-1)

    def numpy(self, x: Any) -> Array:
        return np.asarray(x)


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case in `dtype`; JAX narrows to float32 unless it is told to keep float64."""
    with jax.enable_x64(dtype == "float64"):
        return functional.compute(Jax(), case, inputs, root, dtype)
