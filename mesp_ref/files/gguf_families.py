"""What each architecture of llama.cpp calls a family of ours, and stores otherwise."""

from typing import NamedTuple

import numpy as np

from mesp_ref.engine.config import FAMILIES, PROJECTIONS, Traits
from mesp_ref.files.config import pattern
from mesp_ref.ops import Array, RopeScaling

# Of the keys under an architecture's name, those of all; vocab_size is that of the embedding.
_KEYS = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type",
)  # fmt: skip
_SCALED = ("rope.scaling.factor",)

# GGUF name of a module -> Hugging Face name; those of a block stand under model.layers.N.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": PROJECTIONS["q_proj"],
    "attn_k": PROJECTIONS["k_proj"],
    "attn_v": PROJECTIONS["v_proj"],
    "attn_output": PROJECTIONS["o_proj"],
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": PROJECTIONS["gate_proj"],
    "ffn_up": PROJECTIONS["up_proj"],
    "ffn_down": PROJECTIONS["down_proj"],
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FREQUENCIES = "rope_freqs.weight"  # by what llama3 divides each frequency: [D/2]
GEMMA_PERIOD, SMOLLM3_PERIOD = 6, 4  # llama.cpp's own: every so manieth layer is of the other kind


class Architecture(NamedTuple):
    """An architecture of llama.cpp. Gains of norms are stored whole in all."""

    traits: Traits
    keys: tuple[str, ...] = _KEYS
    block: dict[str, str] = _BLOCK
    interleaved: bool = False  # rows of q and k in the order of interleaved RoPE

    def name(self, module: str) -> str | None:
        """The GGUF name of a module of a checkpoint."""
        for gguf, path in TOP.items():
            if module == path:
                return gguf
        _, _, block, path = module.split(".", 3)
        found = {path: gguf for gguf, path in self.block.items()}.get(path)
        return found and f"blk.{block}.{found}"


ARCHITECTURES = {
    "llama": Architecture(FAMILIES["llama"], _KEYS + _SCALED, interleaved=True),
    "qwen2": Architecture(FAMILIES["qwen2"]),
    "qwen3": Architecture(FAMILIES["qwen3"], _KEYS + _SCALED),
    "smollm3": Architecture(FAMILIES["smollm3"], interleaved=True),
    "gemma3": Architecture(
        FAMILIES["gemma3_text"], (*_KEYS, *_SCALED, "attention.sliding_window"), _BLOCK | _GEMMA
    ),
}
OF_FAMILY = {a.traits.model_type: name for name, a in ARCHITECTURES.items()}


def layer_types(architecture: str, layers: int) -> tuple[str, ...]:
    """The kinds of layers that llama.cpp takes an architecture to have; none where all are alike."""
    if architecture == "gemma3":
        return tuple(pattern(GEMMA_PERIOD, layers))
    if architecture == "smollm3":
        turned = pattern(SMOLLM3_PERIOD, layers)
        return tuple("full_attention" if kind != "full_attention" else "no_rope" for kind in turned)
    return ()


def slowed(scaling: RopeScaling, theta: float, head_dim: int) -> Array:
    """What llama3's scaling divides each frequency by: [D/2], as rope_freqs.weight has it."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = (scaling.original or 0) / (2 * np.pi) * frequency
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling.factor)


def scaling_behind(divisors: Array, theta: float) -> RopeScaling | None:
    """The scaling that divides frequencies so: Llama 3's own numbers, of which files hold but the
    result; None where it is another."""
    factor = float(divisors.max())
    for original in (8192, 4096, 16384, 32768):
        scaling = RopeScaling(round(factor, 3), original, 1.0, 4.0)
        if np.allclose(slowed(scaling, theta, 2 * len(divisors)), divisors, rtol=1e-5):
            return scaling
    return None
