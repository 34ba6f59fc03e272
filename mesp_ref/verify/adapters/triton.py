"""gradcheck of a Triton kernel behind a torch.autograd.Function, run on its GPU."""

from collections.abc import Callable, Sequence
from typing import Any

from mesp_ref.verify.adapters.torch import gradcheck_function
from mesp_ref.verify.gradcheck import GradcheckResult


def gradcheck_kernel(
    function: Callable[..., Any], args: Sequence[Any], *, device: str = "cuda", **options: Any
) -> GradcheckResult:
    """gradcheck of a function that launches Triton kernels, at NumPy arguments moved to `device`.

    Kernels of 16 or 32 bits have no float64 twin: give arguments in the kernel's own type, and the
    gate is in its units. Options and result are those of gradcheck.
    """
    return gradcheck_function(function, args, device=device, **options)
