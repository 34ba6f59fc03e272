"""Liger: its Triton kernels through torch; on a CPU in Triton's interpreter.

Covers what Liger has kernels for: rmsnorm, rope, softmax, swiglu, geglu, cross_entropy, lm_loss
(its fused head), add_norm. pip install --no-deps liger-kernel triton.
"""

from pathlib import Path
from typing import Any

import torch

from mesp_ref.golden.backends import interpreter
from mesp_ref.golden.backends.kernels import Library, Tensors, compute_op, doubled, masked
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

interpreter.prepare()

from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # noqa: E402
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # noqa: E402
from liger_kernel.ops.fused_linear_cross_entropy import (  # noqa: E402
    LigerFusedLinearCrossEntropyFunction,
)
from liger_kernel.ops.geglu import LigerGELUMulFunction  # noqa: E402
from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: E402
from liger_kernel.ops.rope import LigerRopeFunction  # noqa: E402
from liger_kernel.ops.softmax import LigerSoftmaxFunction  # noqa: E402
from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # noqa: E402


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """As for Llama and Qwen: n in float32, the rest in the type of x; x is left alone."""
    y: torch.Tensor = LigerRMSNormFunction.apply(v["x"], v["w"], at["eps"], 0.0, "llama", False)
    return y


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """q and k [N, H, T, D] at once; tables [1, T, D]. Given x for both, the first is the answer."""
    x = v["x"].transpose(1, 2)
    q, _ = LigerRopeFunction.apply(
        x.contiguous().clone(),
        x.detach().contiguous().clone(),
        *(doubled(v[n]) for n in ("cos", "sin")),
    )
    return q.transpose(1, 2)


def _causal_softmax(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LigerSoftmaxFunction.apply(masked(v["s"]))
    return y


def _swiglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LigerSiLUMulFunction.apply(v["gate"].clone(), v["up"].clone())
    return y


def _geglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LigerGELUMulFunction.apply(v["gate"].clone(), v["up"].clone())
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


def _add_norm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    both = LigerFusedAddRMSNormFunction.apply(
        v["f"], v["x"], v["w"], at["eps"], 0.0, "llama", False
    )
    return torch.cat(both, -1)


OPS: Library = {
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "causal_softmax": _causal_softmax,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
    "add_norm": _add_norm,
}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    with interpreter.device() as device:
        return compute_op(OPS, case, inputs, dtype, device=device)
