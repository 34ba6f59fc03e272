"""gradcheck of a torch.autograd.Function, on the CPU or where its kernels run."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mesp_ref.verify.gradcheck import GradcheckResult, gradcheck
from mesp_ref.verify.tree import leaves, rebuild


class _Bridge:
    """Tensors that share no memory with the arrays they come from, and back; bfloat16 too."""

    def __init__(self, device: str):
        self.torch: Any = importlib.import_module("torch")
        self.device = device

    def tensor(self, value: Any, grad: bool = False) -> Any:
        """A leaf; what is no array stays."""
        if not isinstance(value, np.ndarray):
            return value
        dense = np.array(
            value, order="C"
        )  # keeps a scalar one, and torch takes no negative strides
        if dense.dtype.name == "bfloat16":
            made = self.torch.tensor(dense.view(np.int16)).view(self.torch.bfloat16)
        else:
            made = self.torch.tensor(dense)
        made = made.to(self.device)
        return made.requires_grad_(grad and made.is_floating_point())

    def array(self, value: Any) -> Any:
        """The other way."""
        if not isinstance(value, self.torch.Tensor):
            return value
        value = value.detach().cpu()
        if value.dtype is self.torch.bfloat16:
            import ml_dtypes  # NumPy has no bfloat16 of its own

            return value.contiguous().view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy().copy()

    def tensors(self, args: Sequence[Any], grad: bool) -> list[Any]:
        """Every array of the arguments as a tensor, in the same lists and dictionaries."""
        given = tuple(args)
        made = [self.tensor(leaf, grad) for _, leaf in leaves(given)]
        return list(rebuild(given, made))

    def arrays(self, value: Any) -> Any:
        """Every tensor as an array."""
        return rebuild(value, [self.array(leaf) for _, leaf in leaves(value)])


def as_pair(
    function: Callable[..., Any], device: str = "cpu"
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward of a torch function as functions of NumPy arrays.

    Each call makes fresh leaf tensors; the backward runs torch.autograd.grad, so it exercises the
    function's own `backward`. Outputs without a gradient (an argmax) are left out of it.
    """
    bridge = _Bridge(device)
    torch = bridge.torch

    def forward(*args: Any) -> Any:
        with torch.no_grad():
            return bridge.arrays(function(*bridge.tensors(args, grad=False)))

    def backward(dy: Any, *args: Any) -> tuple[Any, ...]:
        given = bridge.tensors(args, grad=True)
        made = [y for _, y in leaves(function(*given))]
        dys = [np.asarray(d) for _, d in leaves(dy)]
        used = [
            (y, d) for y, d in zip(made, dys, strict=True) if getattr(y, "requires_grad", False)
        ]
        parts = [leaf for _, leaf in leaves(tuple(given))]
        wanted = [t for t in parts if isinstance(t, torch.Tensor) and t.requires_grad]
        outputs, cotangents = [y for y, _ in used], [bridge.tensor(d) for _, d in used]
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        grads = [
            None
            if not (isinstance(t, torch.Tensor) and t.requires_grad)
            else bridge.array(next(found))
            for t in parts
        ]
        return tuple(rebuild(tuple(given), grads))

    return forward, backward


def gradcheck_function(
    function: Callable[..., Any], args: Sequence[Any], *, device: str = "cpu", **options: Any
) -> GradcheckResult:
    """gradcheck of `MyFunction.apply` (or any torch callable) at NumPy arguments.

    Truth comes from the torch forward itself: by complex step where it takes complex tensors, else
    by Richardson's differences. Options and result are those of gradcheck.
    """
    return gradcheck(*as_pair(function, device), args, **options)
