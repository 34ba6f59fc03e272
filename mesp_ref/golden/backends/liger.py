"""Liger: its Triton kernels through torch; on a CPU in Triton's interpreter.

Covers what Liger has kernels for: rmsnorm, rope, swiglu, cross_entropy, lm_loss (its fused head).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction

from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.backends.torch import to_numpy, to_torch
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

Tensors = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = ("rmsnorm", "swiglu")  # they call libdevice, or cast scalars: no interpreter does
DTYPES = ("float32", "float16", "bfloat16")


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """As for Llama and Qwen: n in float32, the rest in the type of x; x is left alone."""
    y: torch.Tensor = LigerRMSNormFunction.apply(v["x"], v["w"], at["eps"], 0.0, "llama", False)
    return y


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """q and k [N, H, T, D] at once; tables [1, T, D]. Given x for both, the first is the answer."""
    x = v["x"].transpose(1, 2)
    cos, sin = (torch.cat([v[n]] * 2, -1)[None].contiguous() for n in ("cos", "sin"))
    q, _ = LigerRopeFunction.apply(
        x.contiguous().clone(), x.detach().contiguous().clone(), cos, sin
    )
    return q.transpose(1, 2)


def _swiglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LigerSiLUMulFunction.apply(v["gate"].clone(), v["up"].clone())
    return y


def _cross_entropy(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LigerCrossEntropyFunction.apply(v["logits"].clone(), v["labels"], None, -100)[
        0
    ]
    return y


def _lm_loss(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    x, labels = v["x"].reshape(-1, v["x"].shape[-1]), v["labels"].reshape(-1)
    y: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(x, v["w"], labels)[0]
    return y


OPS: dict[str, Callable[[Tensors, dict[str, Any]], torch.Tensor]] = {
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    op = case.attributes.get("op") if case.kind in ("op", "tile") else None
    if op not in OPS or dtype not in DTYPES or (DEVICE == "cpu" and op in NEEDS_GPU):
        raise NotCovered
    given = {n: to_torch(a, getattr(torch, dtype)) for n, a in inputs.items()}
    leaves = {n: a.detach().to(DEVICE) for n, a in given.items()}
    names = [t.name[1:] for t in case.tensors if t.name != "y"]
    for name in names:
        leaves[name].requires_grad_()
    dy = leaves.pop("dy")
    y = OPS[op](leaves, case.attributes)
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy.to(y.dtype))
    found = {"y": y} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}
    return {n: to_numpy(a.cpu()) for n, a in found.items()}
