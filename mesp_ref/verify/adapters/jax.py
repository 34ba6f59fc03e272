"""gradcheck of a jax.custom_vjp function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck
from mesp_ref.verify.pair import is_float
from mesp_ref.verify.tree import leaves, rebuild


def as_pair(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the VJP of a JAX function as functions of NumPy arrays.

    Arguments and outputs may be arrays in lists, tuples and dictionaries; whole numbers and masks get
    no gradient. Runs with 64-bit types enabled for the call, whatever the global setting is.
    """
    jax: Any = importlib.import_module("jax")

    def arrays(value: Any) -> Any:
        return rebuild(value, [np.array(leaf) for _, leaf in leaves(value)])

    def forward(*args: Any) -> Any:
        with jax.enable_x64(True):
            return arrays(function(*args))

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        parts = [leaf for _, leaf in leaves(args)]
        at = [i for i, part in enumerate(parts) if is_float(part) or _is_complex(part)]

        def of_floats(*moving: Any) -> Any:
            full = list(parts)
            for i, value in zip(at, moving, strict=True):
                full[i] = value
            made = [leaf for _, leaf in leaves(function(*rebuild(args, full)))]
            return [
                y for y in made if jax.numpy.issubdtype(jax.numpy.result_type(y), jax.numpy.inexact)
            ]

        with jax.enable_x64(True):
            made, vjp = jax.vjp(of_floats, *(jax.numpy.asarray(parts[i]) for i in at))
            dys = [leaf for _, leaf in leaves(dy) if is_float(np.asarray(leaf))]
            found = vjp([jax.numpy.asarray(d, y.dtype) for d, y in zip(dys, made, strict=True)])
            grads: list[Any] = [None] * len(parts)
            for i, grad in zip(at, found, strict=True):
                grads[i] = np.array(grad)
        return tuple(rebuild(args, grads))

    return forward, backward


def _is_complex(part: Any) -> bool:
    return isinstance(part, np.ndarray) and part.dtype.kind == "c"


def gradcheck_custom_vjp(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> GradcheckResult:
    """gradcheck of a function decorated with jax.custom_vjp (or any JAX function) at NumPy arguments."""
    return gradcheck(*as_pair(function), args, **options)
