"""Flash Linear Attention: its Triton kernels through torch; on a CPU in Triton's interpreter.

Covers rmsnorm, add_norm, rope, attention and masked_attention (parallel_attn, where Tq = Tk), swiglu,
cross_entropy and lm_loss (its fused head).
pip install --no-deps flash-linear-attention fla-core einops triton.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from mesp_ref.golden.backends import NotCovered, interpreter
from mesp_ref.golden.backends.kernels import Library, Tensors, compute_op, mean_of_counted
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

interpreter.prepare()
with warnings.catch_warnings():  # it says that there is no GPU
    warnings.simplefilter("ignore")
    from fla.modules.activations.ops import swiglu
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss
    from fla.modules.fused_linear_cross_entropy.ops import fused_linear_cross_entropy_loss
    from fla.modules.norm.layernorm import rms_norm
    from fla.modules.rotary.ops import rotary_embedding
    from fla.ops.attn.parallel import parallel_attn


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = rms_norm(v["x"], v["w"], None, eps=at["eps"])
    return y


def _add_norm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    both = rms_norm(v["f"], v["w"], None, residual=v["x"], eps=at["eps"], prenorm=True)
    return torch.cat(both, -1)


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = rotary_embedding(v["x"], v["cos"], v["sin"])
    return y


def _attention(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    if v["q"].shape[1] != v["k"].shape[1]:
        raise NotCovered
    y: torch.Tensor = parallel_attn(v["q"], v["k"], v["v"])
    return y


def _masked_attention(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """Documents as one long row and where each begins."""
    positions, shape, options = v.get("positions"), v["q"].shape, {}
    q, k, u = (v[n] for n in "qkv")
    if positions is not None:
        begins = torch.nonzero(positions.flatten() == 0).flatten()
        options["cu_seqlens"] = torch.cat([begins, begins.new_tensor([positions.numel()])])
        q, k, u = (x.flatten(0, 1)[None] for x in (q, k, u))
    y: torch.Tensor = parallel_attn(
        q, k, u, scale=at.get("scale"), window_size=at.get("window"), **options
    )
    return y.view(shape)


def _swiglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = swiglu(v["gate"], v["up"])
    return y


def _cross_entropy(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    return mean_of_counted(cross_entropy_loss(v["logits"], v["labels"])[0], v["labels"])


def _lm_loss(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    x, labels = v["x"].reshape(-1, v["x"].shape[-1]), v["labels"].reshape(-1)
    y: torch.Tensor = fused_linear_cross_entropy_loss(x, labels, v["w"])
    return y


OPS: Library = {
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "add_norm": _add_norm,
    "attention": _attention,
    "masked_attention": _masked_attention,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    with interpreter.device() as device:
        return compute_op(OPS, case, inputs, dtype, device=device)
