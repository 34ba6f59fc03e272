"""gradcheck of a torch.autograd.Function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck


def as_pair(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward of a torch function as functions of NumPy arrays.

    Each call makes fresh leaf tensors that share no memory with the arrays; the backward runs
    torch.autograd.grad, so it exercises the function's own `backward`.
    """
    torch: Any = importlib.import_module("torch")

    def tensor(value: Any, grad: bool) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        made = torch.tensor(np.ascontiguousarray(value))
        return made.requires_grad_(grad and made.is_floating_point())

    def call(args: Sequence[Any], grad: bool) -> tuple[list[Any], tuple[Any, ...]]:
        tensors = [tensor(value, grad) for value in args]
        y = function(*tensors)
        return tensors, y if isinstance(y, tuple) else (y,)

    def forward(*args: Any) -> Any:
        with torch.no_grad():
            _, outputs = call(args, grad=False)
        arrays = tuple(y.numpy() for y in outputs)
        return arrays if len(arrays) > 1 else arrays[0]

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        tensors, outputs = call(args, grad=True)
        dys = dy if isinstance(dy, tuple) else (dy,)
        leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        found = torch.autograd.grad(
            outputs, leaves, [torch.tensor(d) for d in dys], allow_unused=True
        )
        zeros = [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)
        ]
        return tuple(g.numpy() for g in zeros)

    return forward, backward


def gradcheck_function(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> GradcheckResult:
    """gradcheck of `MyFunction.apply` (or any torch callable) at NumPy arguments.

    Truth comes from the torch forward itself: by complex step where it takes complex tensors, else
    by Richardson's differences. Options and result are those of gradcheck.
    """
    return gradcheck(*as_pair(function), args, **options)
