"""gradcheck of a jax.custom_vjp function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck


def as_pair(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the VJP of a JAX function as functions of NumPy arrays.

    Runs with 64-bit types enabled for the call, whatever the global setting is.
    """
    jax: Any = importlib.import_module("jax")

    def floating(args: Sequence[Any]) -> list[int]:
        return [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind in "fc"]

    def forward(*args: Any) -> Any:
        with jax.enable_x64(True):
            y = function(*args)
            return tuple(map(np.asarray, y)) if isinstance(y, tuple) else np.asarray(y)

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        at = floating(args)

        def of_floats(*moving: Any) -> Any:
            full = list(args)
            for i, value in zip(at, moving, strict=True):
                full[i] = value
            return function(*full)

        with jax.enable_x64(True):
            _, vjp = jax.vjp(of_floats, *(jax.numpy.asarray(args[i]) for i in at))
            given = (
                tuple(map(jax.numpy.asarray, dy))
                if isinstance(dy, tuple)
                else jax.numpy.asarray(dy)
            )
            return tuple(np.array(g) for g in vjp(given))

    return forward, backward


def gradcheck_custom_vjp(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> GradcheckResult:
    """gradcheck of a function decorated with jax.custom_vjp (or any JAX function) at NumPy arguments."""
    return gradcheck(*as_pair(function), args, **options)
