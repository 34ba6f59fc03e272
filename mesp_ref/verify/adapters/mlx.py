"""gradcheck of an MLX function with a custom VJP."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck
from mesp_ref.verify.pair import is_float
from mesp_ref.verify.tree import leaves, rebuild


class _Bridge:
    """NumPy arrays as those of MLX, and back; bfloat16 too."""

    def __init__(self) -> None:
        self.mx: Any = importlib.import_module("mlx.core")

    def array(self, value: Any) -> Any:
        """What is no array stays."""
        mx = self.mx
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.name == "bfloat16":  # mx.array knows NumPy's own types only
            return mx.array(value.astype(np.float32)).astype(mx.bfloat16)
        dense = np.array(value, order="C")  # MLX takes no negative strides
        # Without its type said, float64 becomes float32 in MLX.
        return mx.array(dense, dtype=mx.float64) if dense.dtype == np.float64 else mx.array(dense)

    def numpy(self, value: Any) -> Any:
        """The other way."""
        mx = self.mx
        if not isinstance(value, mx.array):
            return value
        if value.dtype == mx.bfloat16:
            import ml_dtypes  # NumPy has no bfloat16 of its own

            return np.array(value.astype(mx.float32)).astype(ml_dtypes.bfloat16)
        return np.array(value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return rebuild(value, [change(leaf) for _, leaf in leaves(value)])


def as_pair(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the VJP of an MLX function as functions of NumPy arrays, run on the CPU.

    MLX computes in float64 on the CPU only, so that is where the check runs. Arguments and outputs
    may be arrays in lists, tuples and dictionaries.
    """
    bridge = _Bridge()
    mx = bridge.mx

    def forward(*args: Any) -> Any:
        with mx.stream(mx.cpu):
            return _each(bridge.numpy, function(*_each(bridge.array, args)))

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        given = [np.asarray(leaf) for _, leaf in leaves(dy)]
        with mx.stream(mx.cpu):
            parts = [bridge.array(leaf) for _, leaf in leaves(args)]
            at = [i for i, (_, leaf) in enumerate(leaves(args)) if is_float(leaf)]

            def of_floats(*moving: Any) -> list[Any]:
                full = list(parts)
                for i, value in zip(at, moving, strict=True):
                    full[i] = value
                made = [leaf for _, leaf in leaves(function(*rebuild(args, full)))]
                return [y for y, d in zip(made, given, strict=True) if is_float(d)]

            dys = [bridge.array(d) for d in given if is_float(d)]
            _, found = mx.vjp(of_floats, [parts[i] for i in at], dys)
            grads: list[Any] = [None] * len(parts)
            for i, grad in zip(at, found, strict=True):
                grads[i] = bridge.numpy(grad)
        return tuple(rebuild(args, grads))

    return forward, backward


def gradcheck_custom(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> GradcheckResult:
    """gradcheck of an mlx.core.custom_function (or any MLX function) at NumPy arguments."""
    return gradcheck(*as_pair(function), args, **options)
