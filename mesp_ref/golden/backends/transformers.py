"""transformers and PEFT: the modules that most people train with, differentiated by torch's autograd.

Covers rmsnorm, rope, positions, attention and masked_attention (by torch's fused attention, whose
backward on a CPU is written by hand), causal_softmax, swiglu, geglu, cross_entropy, head_loss; with
PEFT's layer lora_linear, qkv_lora, mlp_lora, gelu_mlp_lora; blocks (with fused attention) and models
(with eager attention) of every family. Intermediates are its own: ask for
`golden check --roles result,base`. float64 is left out: its norms compute in float32 always.
pip install torch transformers peft.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from mesp_ref.golden.backends import NotCovered
from mesp_ref.golden.backends.kernels import (
    SIXTEEN,
    Library,
    Tensors,
    compute_op,
    doubled,
    masked,
)
from mesp_ref.golden.backends.torch import to_numpy, to_torch
from mesp_ref.golden.rows.masked import first_keys
from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array


def _rmsnorm(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    norm = Qwen2RMSNorm(v["x"].shape[-1], eps=at["eps"])
    y: torch.Tensor = torch.func.functional_call(norm, {"weight": v["w"]}, (v["x"],))
    return y


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = apply_rotary_pos_emb(x, x.detach(), cos, sin, unsqueeze_dim=2)[0]
    return y


def _rope(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    return _turned(v["x"], doubled(v["cos"]), doubled(v["sin"]))


def _attention(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    queries, keys = v["q"].shape[1], v["k"].shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return _sdpa(v, None if queries == keys else seen[None, None])


def _masked_attention(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """With a mask as its models build one from a window and from positions that begin anew."""
    tokens = torch.arange(v["q"].shape[1])
    first = first_keys(v.get("positions"), at.get("window"), tokens)
    seen = (tokens <= tokens[:, None]) & (tokens >= first[:, None, :, None])
    return _sdpa(v, seen, at.get("scale"))


def _sdpa(v: Tensors, seen: torch.Tensor | None, scale: float | None = None) -> torch.Tensor:
    """Its call of torch's fused attention; no mask is the causal one."""
    q, k, u = (v[n].transpose(1, 2) for n in "qkv")
    module: Any = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    y: torch.Tensor = sdpa_attention_forward(
        module, q, k, u, seen, scaling=scale, is_causal=seen is None
    )[0]
    return y


def _causal_softmax(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """As in its eager attention: in float32, and rounded."""
    return F.softmax(masked(v["s"]), dim=-1, dtype=torch.float32).to(v["s"].dtype)


def _swiglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = ACT2FN["silu"](v["gate"]) * v["up"]
    return y


def _geglu(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    y: torch.Tensor = ACT2FN["gelu_pytorch_tanh"](v["gate"]) * v["up"]
    return y


def _cross_entropy(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    """In float32, divided by the number of counted labels as its trainer hands it over."""
    counted = (v["labels"] != -100).sum().clamp(min=1)
    y: torch.Tensor = fixed_cross_entropy(v["logits"].float(), v["labels"], counted)
    return y


def _head_loss(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    logits = F.linear(_rmsnorm(v, at), v["head"]).flatten(0, -2)
    return _cross_entropy({"logits": logits, "labels": v["labels"].flatten()}, at)


def _part(x: torch.Tensor, v: Tensors, s: float, letter: str = "") -> torch.Tensor:
    """PEFT's layer with the weights of a part."""
    rank, (rows, columns) = len(v[f"A{letter}"]), v[f"w{letter}"].shape
    bias = v.get(f"b{letter}")
    holder = torch.nn.ModuleDict({"part": torch.nn.Linear(columns, rows, bias=bias is not None)})
    alpha: Any = s * rank  # PEFT's annotation is an int; it takes any number
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["part"])
    layer = inject_adapter_in_model(config, holder).get_submodule("part")
    values = {
        "base_layer.weight": v[f"w{letter}"],
        "lora_A.default.weight": v[f"A{letter}"],
        "lora_B.default.weight": v[f"B{letter}"],
    } | ({} if bias is None else {"base_layer.bias": bias})
    y: torch.Tensor = torch.func.functional_call(layer, values, (x,))
    return y


LAYERS = {
    "qwen2": Qwen2DecoderLayer,
    "qwen3": Qwen3DecoderLayer,
    "llama": LlamaDecoderLayer,
    "gemma3_text": Gemma3DecoderLayer,
}


def _lora_linear(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    return _part(v["x"], v, at["s"])


def _qkv_lora(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    return torch.cat([_part(v["x"], v, at["s"], letter) for letter in "qkv"], -1)


def _mlp_lora(v: Tensors, at: dict[str, Any]) -> torch.Tensor:
    gate, up = (_part(v["x"], v, at["s"], letter) for letter in "gu")
    gated = _geglu if at.get("is_gelu") else _swiglu
    return _part(gated({"gate": gate, "up": up}, at), v, at["s"], "d")


OPS: Library = {
    "rmsnorm": _rmsnorm,
    "rope": _rope,
    "attention": _attention,
    "masked_attention": _masked_attention,
    "causal_softmax": _causal_softmax,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "head_loss": _head_loss,
    "lora_linear": _lora_linear,
    "qkv_lora": _qkv_lora,
    "mlp_lora": _mlp_lora,
    "gelu_mlp_lora": _mlp_lora,
}


def _positions(case: Case, given: Tensors) -> Tensors:
    """RoPE at the case's positions, by its own table of angles."""
    at, x = case.attributes, given["x"]
    scaling = at["scaling"] or {"rope_type": "default"}
    config = LlamaConfig(
        head_dim=x.shape[-1], max_position_embeddings=131072,
        rope_parameters={"rope_theta": at["theta"], **scaling},
    )  # fmt: skip
    positions = given["positions"].reshape(-1, x.shape[1])
    y = _turned(x, *LlamaRotaryEmbedding(config)(x, positions))
    return {"y": y, "dx": torch.autograd.grad(y, x, given["dy"])[0]}


def _plain(name: str) -> str:
    """A parameter's name as the suite has it, without PEFT's wrappers."""
    return name.replace(".base_layer", "").replace(".default", "")


def _block(case: Case, given: Tensors) -> Tensors:
    """A decoder layer of the case's family with PEFT's layers in it."""
    at = case.attributes
    config = CONFIG_MAPPING[at["config"]["model_type"]](
        **at["config"] | {"attn_implementation": "sdpa"}
    )
    parts = sorted({n.split(".lora_")[0].split(".")[-1] for n in given if ".lora_" in n})
    lora = LoraConfig(r=at["rank"], lora_alpha=at["alpha"], target_modules=parts)
    layer = inject_adapter_in_model(lora, LAYERS[config.model_type](config, 0))
    values = {name: given[_plain(name)] for name, _ in layer.named_parameters()}
    tables = tuple(doubled(given[n]) for n in ("cos", "sin"))
    more = {"position_embeddings": tables, "attention_mask": _window(config, given["x"].shape[1])}
    y = torch.func.functional_call(layer, values, (given["x"],), more)
    torch.autograd.backward(y, given["dy"])
    grads = {f"{_plain(name)}.grad": value.grad for name, value in values.items()}
    return {"y": y, "dx": given["x"].grad} | grads


def _window(config: Any, tokens: int) -> torch.Tensor | None:
    """The mask that a model hands to a layer with a window; none where all see all before them."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return (seen & seen.triu(1 - config.sliding_window))[None, None]


def _model(case: Case, given: Tensors, root: Path, dtype: torch.dtype) -> Tensors:
    """A checkpoint and an adapter as its users load them; the loss is its own."""
    base = AutoModelForCausalLM.from_pretrained(
        root / case.attributes["model"], dtype=dtype, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(
        base,
        str(root / case.attributes["adapter"]),
        is_trainable=True,
        autocast_adapter_dtype=False,
    )
    model.requires_grad_(True)
    loss = model(input_ids=given["input_ids"], labels=given["labels"]).loss
    loss.backward()
    found = {"loss": loss}
    for name, parameter in model.named_parameters():
        plain = _plain(name)
        if ".lora_" not in plain:
            plain = plain.removeprefix("base_model.model.")
        found[f"{plain}.grad"] = parameter.grad
    return found


def compute(case: Case, inputs: dict[str, Array], root: Path, dtype: str) -> dict[str, Array]:
    """One case in `dtype`."""
    if dtype not in SIXTEEN:
        raise NotCovered
    if case.kind in ("op", "tile"):
        return compute_op(OPS, case, inputs, dtype)
    precision: torch.dtype = getattr(torch, dtype)
    given = {name: to_torch(array, precision) for name, array in inputs.items()}
    if case.kind == "positions":
        found = _positions(case, given)
    elif case.kind == "block":
        found = _block(case, given)
    elif case.kind == "e2e":
        found = _model(case, given, root, precision)
    else:
        raise NotCovered
    wanted = {tensor.name for tensor in case.tensors}
    return {name: to_numpy(tensor) for name, tensor in found.items() if name in wanted}
