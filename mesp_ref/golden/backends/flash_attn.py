"""FlashAttention: its Triton kernels through torch; on a CPU in Triton's interpreter.

Covers attention (with its kernels for AMD, which are in Triton), rmsnorm, add_norm, rope and
cross_entropy.
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-deps
--no-build-isolation flash-attn; and einops, triton.
"""

import os
from pathlib import Path
from typing import Any

import torch

from mesp_ref.golden.backends import interpreter
from mesp_ref.golden.backends.kernels import (
    Library,
    Tensors,
    compute_op,
    drop_options,
    mean_of_counted,
)
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

interpreter.prepare()
os.environ.setdefault("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")  # read at import
with interpreter.device():
    from flash_attn import flash_attn_func, flash_attn_interface
    from flash_attn.layers.rotary import apply_rotary_emb
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

if interpreter.DEVICE == "cuda" and not torch.version.hip:
    drop_options("waves_per_eu")  # of AMD's compiler; NVIDIA's raises at it
for op in (flash_attn_interface._flash_attn_forward, flash_attn_interface._flash_attn_backward):
    op.register_kernel("cpu")(op._init_fn)  # it registers its operators for GPUs only


def _attention(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = flash_attn_func(v["q"], v["k"], v["v"], causal=True)
    return y


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = rms_norm_fn(v["x"], v["w"], None, eps=at["eps"])
    return y


def _add_norm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    both = rms_norm_fn(v["f"], v["w"], None, residual=v["x"], eps=at["eps"], prenorm=True)
    return torch.cat(both, -1)


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = apply_rotary_emb(v["x"], v["cos"], v["sin"])
    return y


def _cross_entropy(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    return mean_of_counted(cross_entropy_loss(v["logits"], v["labels"])[0], v["labels"])


OPS: Library = {
    "attention": _attention,
    "rmsnorm": _rmsnorm,
    "add_norm": _add_norm,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    with interpreter.device() as device:
        return compute_op(OPS, case, inputs, dtype, device=device)
