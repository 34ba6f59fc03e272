"""NumPy as a framework of the functional twins: gradients by complex step, so exact to rounding."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from mesp_ref.ops import Array

STEP = 2.0**-200


class NumPy:
    """See functional.Framework."""

    xp = np
    dtypes = MappingProxyType({"float64": np.float64})

    def silu(self, x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def softmax(self, x: Any) -> Any:
        e = np.exp(x - x.real.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    def logsumexp(self, x: Any) -> Any:
        top = x.real.max(axis=-1, keepdims=True)
        return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]

    def vjp(self, f: Callable[..., Any], primals: list[Any], cotangent: Any) -> list[Any]:
        """⟨cotangent, ∂f/∂x⟩ of every entry x of every primal."""
        point = [primal.astype(complex) for primal in primals]
        grads = []
        for x in point:
            grad = np.zeros(x.shape)
            for at in np.ndindex(*x.shape):
                x[at] += 1j * STEP
                grad[at] = (cotangent * np.imag(f(*point))).sum() / STEP
                x[at] = x[at].real
            grads.append(grad)
        return grads

    def numpy(self, x: Any) -> Array:
        return np.asarray(x)
