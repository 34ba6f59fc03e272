"""What adapters of kernels under torch share: one op of the suite, its gradients by their backward.

A library is a mapping from the names of ops to functions `f(tensors, attributes) -> y`; torch's autograd
then calls the backward that belongs to the kernel. A gradient that a kernel does not form is left out
(`golden check --roles result` does not ask for those of base weights).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.backends.torch import to_numpy, to_torch
from mesp_ref.golden.suite import Case
from mesp_ref.ops import IGNORED, Array

Tensors = dict[str, torch.Tensor]
Library = Mapping[str, Callable[[Tensors, dict[str, Any]], torch.Tensor]]
SIXTEEN = ("float32", "float16", "bfloat16")


def compute_op(
    library: Library,
    case: Case,
    inputs: dict[str, Array],
    dtype: str,
    *,
    dtypes: Sequence[str] = SIXTEEN,
    device: str = "cpu",
) -> dict[str, Array]:
    """The output of one op and the gradients that its backward forms.

    Raises NotCovered for an op that the library has not, and a precision that it does not take
    """
    op = case.attributes.get("op", "") if case.kind in ("op", "tile") else ""
    if op not in library or dtype not in dtypes:
        raise NotCovered
    given = {n: to_torch(a, getattr(torch, dtype)) for n, a in inputs.items()}
    leaves = {n: a.detach().to(device) for n, a in given.items()}
    dy = leaves.pop("dy")
    names = [t.name[1:] for t in case.tensors if t.name[1:] in leaves]
    for name in names:
        leaves[name].requires_grad_()
    y = library[op](leaves, case.attributes)
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy.to(y.dtype), allow_unused=True)
    found = {"y": y} | {f"d{n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    return {n: to_numpy(a) for n, a in found.items()}


def masked(scores: torch.Tensor) -> torch.Tensor:
    """Scores [..., Tq, Tk] with −∞ where a query may not look, for a softmax that knows no mask."""
    queries, keys = scores.shape[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(~seen.tril(keys - queries), -torch.inf)


def mean_of_counted(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over rows whose label counts, where a kernel's loss is that of each row."""
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def doubled(table: torch.Tensor) -> torch.Tensor:
    """A table [T, D/2] as transformers lays it out: [1, T, D], both halves the same."""
    return torch.cat([table, table], -1)[None].contiguous()


def drop_options(*names: str) -> None:
    """Start kernels without options of a compiler that is not the one at hand."""
    from triton.runtime.jit import JITFunction

    start = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        return start(self, *args, **{n: v for n, v in options.items() if n not in names})

    JITFunction.run = run
