"""HIPS autograd: the shared forward on its NumPy, gradients by its make_vjp (float64 and float32)."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import make_vjp

from mesp_ref.golden.backends import functional
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array


class Numbers:
    """autograd.numpy, and the one function without a derivative there, by indexing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(anp, name)

    def take_along_axis(self, x: Any, index: Any, axis: int) -> Any:
        return x[anp.arange(len(x))[:, None], index]


class Autograd:
    """See functional.Framework."""

    xp = Numbers()
    dtypes = MappingProxyType({"float64": np.float64, "float32": np.float32})

    def vjp(self, f: Callable[..., Any], primals: list[Any], cotangent: Any) -> list[Any]:
        return list(make_vjp(lambda values: f(*values))(tuple(primals))[0](cotangent))

    def silu(self, x: Any) -> Any:
        return x / (1 + anp.exp(-x))

    def softmax(self, x: Any) -> Any:
        e = anp.exp(x - anp.max(x, axis=-1, keepdims=True))
        return e / anp.sum(e, axis=-1, keepdims=True)

    def logsumexp(self, x: Any) -> Any:
        top = anp.max(x, axis=-1, keepdims=True)
        return (anp.log(anp.sum(anp.exp(x - top), axis=-1, keepdims=True)) + top)[..., 0]

    def numpy(self, x: Any) -> Array:
        return np.asarray(x)


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case in `dtype`."""
    with np.errstate(all="ignore"):  # a saturated exp overflows in it: see docs/scoreboard.md
        return functional.compute(Autograd(), case, inputs, root, dtype)
