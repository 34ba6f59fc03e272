"""tinygrad: its own layers and losses, gradients by Tensor.gradient, in four precisions.

Covers every op; norms not in float64, as its layer computes in float32. It compiles with
clang (19 knows bfloat16, 14 does not), or what DEV says; without clang it runs in its Python device,
which leaves out the tile tier. pip install tinygrad.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

if shutil.which("clang") is None:
    os.environ.setdefault("DEV", "PYTHON")  # read at import

from tinygrad import Tensor, dtypes, nn

Values = dict[str, Any]
NAMES = ("float64", "float32", "float16", "bfloat16")
NORMS = ("rmsnorm", "add_norm", "head_loss")
IGNORED = -100


def _linear(v: Values, at: Values) -> Any:
    return v["x"].linear(v["w"].T, v.get("b"))


def _part(x: Any, v: Values, s: float, letter: str = "") -> Any:
    """A layer with LoRA, with the weights of a part."""
    low = x.linear(v[f"A{letter}"].T).linear(v[f"B{letter}"].T)
    return x.linear(v[f"w{letter}"].T, v.get(f"b{letter}")) + low * s


def _lora_linear(v: Values, at: Values) -> Any:
    return _part(v["x"], v, at["s"])


def _qkv_lora(v: Values, at: Values) -> Any:
    q, k, u = (_part(v["x"], v, at["s"], letter) for letter in "qkv")
    return q.cat(k, u, dim=-1)


def _mlp_lora(v: Values, at: Values) -> Any:
    gate, up = (_part(v["x"], v, at["s"], letter) for letter in "gu")
    gated = _geglu if at.get("is_gelu") else _swiglu
    return _part(gated({"gate": gate, "up": up}, at), v, at["s"], "d")


def _rmsnorm(v: Values, at: Values) -> Any:
    norm = nn.RMSNorm(v["x"].shape[-1], at["eps"])
    norm.weight = v["w"]
    return norm(v["x"])


def _add_norm(v: Values, at: Values) -> Any:
    total = v["x"] + v["f"]
    return _rmsnorm(v | {"x": total}, at).cat(total, dim=-1)


def _rope(v: Values, at: Values) -> Any:
    """By hand: the module that holds its own imports a file that the wheel of 0.14 lacks."""
    first, second = v["x"].chunk(2, dim=-1)
    cos, sin = (v[n].unsqueeze(1) for n in ("cos", "sin"))
    return (first * cos - second * sin).cat(second * cos + first * sin, dim=-1)


def _seen(queries: int, keys: int) -> Any:
    return Tensor.ones(queries, keys, dtype=dtypes.bool).tril(keys - queries)


def _causal_softmax(v: Values, at: Values) -> Any:
    return _seen(*v["s"].shape[-2:]).where(v["s"], -float("inf")).softmax(-1)


def _attention(v: Values, at: Values) -> Any:
    return _masked(v, _seen(v["q"].shape[1], v["k"].shape[1]))


def _masked_attention(v: Values, at: Values) -> Any:
    """A scale of its own is put into q, whose scores are divided by √D."""
    token = Tensor.arange(v["q"].shape[1])
    first = token[None] - v.get("positions", token[None])
    if "window" in at:
        first = first.maximum(token[None] - at["window"] + 1)
    seen = (token[None, None] <= token[None, :, None]) & (token[None, None] >= first.unsqueeze(-1))
    factor = at["scale"] * v["q"].shape[-1] ** 0.5 if "scale" in at else 1.0
    return _masked(v | {"q": v["q"] * factor}, seen.unsqueeze(1))


def _masked(v: Values, seen: Any) -> Any:
    q, k, u = (v[n].transpose(1, 2) for n in "qkv")
    return q.scaled_dot_product_attention(k, u, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def _swiglu(v: Values, at: Values) -> Any:
    return v["gate"].silu() * v["up"]


def _geglu(v: Values, at: Values) -> Any:
    return v["gate"].gelu() * v["up"]


def _embedding(v: Values, at: Values) -> Any:
    layer = nn.Embedding(*v["w"].shape)
    layer.weight = v["w"]
    return layer(v["ids"])


def _cross_entropy(v: Values, at: Values) -> Any:
    return v["logits"].sparse_categorical_crossentropy(v["labels"], ignore_index=IGNORED)


def _head_loss(v: Values, at: Values) -> Any:
    return _lm_loss({"x": _rmsnorm(v, at), "w": v["head"], "labels": v["labels"]}, at)


def _lm_loss(v: Values, at: Values) -> Any:
    return _cross_entropy(v | {"logits": v["x"].linear(v["w"].T)}, at)


OPS: dict[str, Callable[[Values, Values], Any]] = {
    "linear": _linear,
    "lora_linear": _lora_linear,
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "causal_softmax": _causal_softmax,
    "attention": _attention,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "lm_loss": _lm_loss,
    "masked_attention": _masked_attention,
    "qkv_lora": _qkv_lora,
    "mlp_lora": _mlp_lora,
    "gelu_mlp_lora": _mlp_lora,
    "add_norm": _add_norm,
    "head_loss": _head_loss,
}


def _numpy(x: Any, dtype: str) -> Array:
    if x.dtype == dtypes.bfloat16:
        return np.asarray(x.cast(dtypes.float32).numpy().astype(ml_dtypes.bfloat16))
    return np.asarray(x.numpy())


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One op in `dtype`."""
    op = case.attributes.get("op", "") if case.kind in ("op", "tile") else ""
    slow = case.kind == "tile" and os.environ.get("DEV") == "PYTHON"
    if op not in OPS or slow or dtype not in NAMES or (op in NORMS and dtype == "float64"):
        raise NotCovered
    given = {
        name: Tensor(array).cast(getattr(dtypes, dtype))
        if array.dtype.kind == "f"
        else Tensor(array)
        for name, array in inputs.items()
    }
    given = {name: tensor.contiguous().realize() for name, tensor in given.items()}
    dy = given.pop("dy")
    names = [t.name[1:] for t in case.tensors if t.name[1:] in given]
    y = OPS[op](given, case.attributes)
    grads = y.gradient(*(given[name] for name in names), gradient=dy.cast(y.dtype))
    found = {"y": y} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}
    return {name: _numpy(tensor, dtype) for name, tensor in found.items()}
