"""Unsloth: its Triton kernels and its hand-written LoRA layer; on a CPU in Triton's interpreter.

Covers rmsnorm, rope, swiglu, geglu, cross_entropy, and the layers that it writes by hand, which form
no gradient of the base (`golden check --roles result`): lora_linear, qkv_lora, mlp_lora,
gelu_mlp_lora. Only the files of its kernels are imported: the package itself patches transformers
and wants a GPU. pip install --no-deps unsloth unsloth_zoo triton; and transformers.
"""

import contextlib
import io
import os
import sys
import tempfile
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mesp_ref.golden.backends import interpreter
from mesp_ref.golden.backends.kernels import Library, Tensors, compute_op, doubled
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

interpreter.prepare()


def _without_its_init(name: str) -> None:
    """A package whose modules can be imported, though its __init__ has not run."""
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(name=name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")  # unsloth_zoo asks for it
if interpreter.DEVICE == "cpu":
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
COMPILED = tempfile.TemporaryDirectory(prefix="unsloth")  # else a folder where the user stands
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", COMPILED.name)
with contextlib.redirect_stdout(io.StringIO()):  # its greeting
    import unsloth_zoo  # noqa: F401

    _without_its_init("unsloth")
    _without_its_init("unsloth.kernels")
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss
    from unsloth.kernels.fast_lora import LoRA_MLP, LoRA_QKV, LoRA_W
    from unsloth.kernels.geglu import geglu_approx_backward_kernel, geglu_approx_forward_kernel
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm
    from unsloth.kernels.rope_embedding import Fast_RoPE_Embedding
    from unsloth.kernels.swiglu import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel


class _Gated(torch.autograd.Function):
    """A gate's two kernels as one function: the backward leaves dup and dgate in its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any, forward: Any, backward: Any) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.kernel = backward
        return forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        flat = (a.reshape(-1, a.shape[-1]).clone() for a in (dy, *ctx.saved_tensors))
        _, dup, dgate = ctx.kernel(*flat)
        return dgate.view(dy.shape), dup.view(dy.shape), None, None


def _gated(forward: Any, backward: Any) -> Callable[[Tensors, dict[str, Any]], torch.Tensor]:
    def f(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
        apply: Any = _Gated.apply
        y: torch.Tensor = apply(v["gate"], v["up"], forward, backward)
        return y

    return f


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = Fast_RMS_Layernorm.apply(v["x"], v["w"], at["eps"])
    return y


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """In place on what it is given, hence a copy."""
    cos, sin = (doubled(v[n]).flatten(0, 1) for n in ("cos", "sin"))
    y: torch.Tensor = Fast_RoPE_Embedding.apply(v["x"].clone(), cos, sin)
    return y


def _lora_linear(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = LoRA_W.apply(v["x"], v["w"].detach(), None, v["A"], v["B"], at["s"])
    return y + v["b"] if "b" in v else y


def _parts(v: Tensors, letters: str, s: float) -> list[Any]:
    """Weight, its 4-bit state, A, B and scale of each part, as its functions take them."""
    return [x for c in letters for x in (v[f"w{c}"].detach(), None, v[f"A{c}"], v[f"B{c}"], s)]


def _qkv_lora(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """Its backward writes into x, hence a copy."""
    parts = LoRA_QKV.apply(v["x"].clone(), *_parts(v, "qkv", at["s"]), True)
    biases = (v.get(f"b{letter}") for letter in "qkv")
    return torch.cat([y if b is None else y + b for y, b in zip(parts, biases, strict=True)], -1)


def _mlp_lora(forward: Any, backward: Any) -> Callable[[Tensors, dict[str, Any]], torch.Tensor]:
    def f(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
        y: torch.Tensor = LoRA_MLP.apply(
            v["x"].clone(), *_parts(v, "gud", at["s"]), forward, backward, True
        )
        return y

    return f


def _cross_entropy(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    logits, labels = v["logits"][None].clone(), v["labels"][None]
    y: torch.Tensor = fast_cross_entropy_loss(logits, labels)
    return y


OPS: Library = {
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "lora_linear": _lora_linear,
    "qkv_lora": _qkv_lora,
    "mlp_lora": _mlp_lora(swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel),
    "gelu_mlp_lora": _mlp_lora(geglu_approx_forward_kernel, geglu_approx_backward_kernel),
    "swiglu": _gated(swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel),
    "geglu": _gated(geglu_approx_forward_kernel, geglu_approx_backward_kernel),
    "cross_entropy": _cross_entropy,
}


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    with interpreter.device() as device:
        return compute_op(OPS, case, inputs, dtype, device=device)
