"""Small models of other families, written by transformers, and made to compute in true float64.

What transformers keeps in float32 inside a float64 model (see torch_oracle) is replaced where the input
is float64: norms, angles of positions, Gemma's factor of the embedding. The angles are written here
once more, from the wavelengths that transformers documents.
"""

import math
from typing import Any, NamedTuple

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3


class Family(NamedTuple):
    """A family as transformers has it."""

    config: Any
    model: Any


FAMILIES = {
    "llama": Family(LlamaConfig, LlamaForCausalLM),
    "smollm3": Family(SmolLM3Config, SmolLM3ForCausalLM),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM),
    "gemma3": Family(Gemma3TextConfig, Gemma3ForCausalLM),
}

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 60.0, "factor": 7.0, "low_freq_factor": 1.5,
    "high_freq_factor": 5.0, "original_max_position_embeddings": 40,
}  # fmt: skip
_GEMMA = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 123.0},
    "full_attention": {"rope_type": "default", "rope_theta": 54321.0},
}
_STRETCHED = _GEMMA | {
    "full_attention": {"rope_type": "linear", "rope_theta": 54321.0, "factor": 8.0}
}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

# Three and more a family; heads·head_dim is not hidden_size where the family allows it.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama plain": {},
    "llama biased, llama3": {"attention_bias": True, "rope_parameters": _LLAMA3,
                             "tie_word_embeddings": True},
    "llama linear, G=1": {"num_key_value_heads": 1, "head_dim": 10,
                          "rope_parameters": _STRETCHED["full_attention"]},
    "smollm3 plain": {"num_hidden_layers": 4},
    "smollm3 all turned": {"no_rope_layers": [1, 1], "rope_parameters": _LLAMA3},
    "smollm3 every second": {"no_rope_layer_interval": 2, "num_key_value_heads": 4,
                             "tie_word_embeddings": False},
    "qwen3 plain": {"head_dim": 8},
    "qwen3 tied, H=G": {"num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True},
    "qwen3 biased, wide heads": {"head_dim": 14, "attention_bias": True, "num_key_value_heads": 1,
                                 "rope_parameters": {"rope_type": "linear", "rope_theta": 4321.0,
                                                     "factor": 3.0}},
    "gemma3 plain": {"head_dim": 8},
    "gemma3 scaled, G=1": {"head_dim": 6, "num_key_value_heads": 1, "query_pre_attn_scalar": 23,
                           "sliding_window": 2, "rope_parameters": _STRETCHED},
    "gemma3 untied, no window": {"head_dim": 10, "num_key_value_heads": 4,
                                 "layer_types": ["full_attention"] * 2,
                                 "tie_word_embeddings": False, "attention_bias": True},
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model in which nothing is trivially 0 or 1: biases, norms, windows and eps matter."""
    family = FAMILIES[name.split()[0]]
    sizes = {
        "vocab_size": 101, "hidden_size": 24, "intermediate_size": 22, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 3e-3,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    if family.config is Gemma3TextConfig:
        sizes |= {"num_hidden_layers": 3, "layer_types": _WINDOWED, "sliding_window": 4}
        sizes |= {"rope_parameters": _GEMMA, "query_pre_attn_scalar": 8}
    sizes |= CONFIGS[name] | changes
    if len(sizes.get("layer_types", ())) == 2:
        sizes["num_hidden_layers"] = 2
    model = family.model(family.config(attn_implementation="sdpa", **sizes)).eval()
    draw = torch.Generator().manual_seed(seed)
    stored = 0.0 if family.config is Gemma3TextConfig else 1.0
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if "norm" in parameter:
                p.copy_(stored + 0.3 * noise)
            elif parameter.endswith("bias"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(1.5 * noise * p.shape[1] ** -0.5)
    return model


def frequencies(parameters: dict[str, Any], size: int) -> torch.Tensor:
    """Angles of one position, by wavelength."""
    f = 1 / parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    kind = parameters["rope_type"]
    if kind == "default":
        return f
    slow = f / parameters["factor"]
    if kind == "linear":
        return slow
    length = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    found = []
    for fast, stretched in zip(f.tolist(), slow.tolist(), strict=True):
        wavelength = 2 * math.pi / fast
        if wavelength < length / high:
            found.append(fast)
        elif wavelength > length / low:
            found.append(stretched)
        else:
            part = (length / wavelength - low) / (high - low)
            found.append((1 - part) * stretched + part * fast)
    return torch.tensor(found, dtype=torch.float64)


def true_float64(patch: Any) -> None:
    """Give the norms, angles and embeddings of every family float64 arithmetic in float64 models."""
    for module, name in (
        (modeling_llama, "Llama"), (modeling_smollm3, "SmolLM3"), (modeling_qwen3, "Qwen3"),
        (modeling_gemma3, "Gemma3"),
    ):  # fmt: skip
        _patch_norm(patch, getattr(module, f"{name}RMSNorm"))
        _patch_angles(patch, getattr(module, f"{name}RotaryEmbedding"))
    embedding = modeling_gemma3.Gemma3TextScaledWordEmbedding
    shipped = embedding.forward

    def scaled(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype != torch.float64:
            return shipped(self, ids)
        return torch.nn.Embedding.forward(self, ids) * math.sqrt(self.weight.shape[1])

    patch.setattr(embedding, "forward", scaled)


def _patch_norm(patch: Any, norm: Any) -> None:
    shipped, gain = norm.forward, float("Gemma" in norm.__name__)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float64:
            return shipped(self, x)
        eps = self.eps if gain else self.variance_epsilon
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (gain + self.weight)

    patch.setattr(norm, "forward", forward)


def _patch_angles(patch: Any, rotary: Any) -> None:
    shipped = rotary.forward

    @torch.no_grad()
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor, *kind: str) -> Any:
        if x.dtype != torch.float64:
            return shipped(self, x, position_ids, *kind)
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parameters = config.rope_parameters[kind[0]] if kind else config.rope_parameters
        angles = position_ids[..., None].double() * frequencies(parameters, size)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    patch.setattr(rotary, "forward", forward)
