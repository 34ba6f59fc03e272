"""gradcheck of an MLX function with a custom VJP."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck


def as_pair(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the VJP of an MLX function as functions of NumPy arrays, run on the CPU.

    MLX computes in float64 on the CPU only, so that is where the check runs.
    """
    mx: Any = importlib.import_module("mlx.core")

    def array(a: Any) -> Any:
        return mx.array(np.asarray(a, order="C"))  # MLX takes no negative strides

    def given(args: Sequence[Any]) -> list[Any]:
        return [array(a) if isinstance(a, np.ndarray) else a for a in args]

    def floating(args: Sequence[Any]) -> list[int]:
        return [i for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind in "fc"]

    def forward(*args: Any) -> Any:
        with mx.stream(mx.cpu):
            y = function(*given(args))
            return tuple(map(np.array, y)) if isinstance(y, tuple | list) else np.array(y)

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        at, full = floating(args), given(args)

        def of_floats(*moving: Any) -> list[Any]:
            for i, value in zip(at, moving, strict=True):
                full[i] = value
            y = function(*full)
            return list(y) if isinstance(y, tuple | list) else [y]

        dys = dy if isinstance(dy, tuple) else (dy,)
        with mx.stream(mx.cpu):
            _, grads = mx.vjp(of_floats, [full[i] for i in at], list(map(array, dys)))
            return tuple(np.array(g) for g in grads)

    return forward, backward


def gradcheck_custom(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> GradcheckResult:
    """gradcheck of an mlx.core.custom_function (or any MLX function) at NumPy arguments."""
    return gradcheck(*as_pair(function), args, **options)
