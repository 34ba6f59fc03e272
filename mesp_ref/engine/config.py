"""The sizes, constants and family of a model, checked when they are given."""

from dataclasses import dataclass
from math import inf
from typing import NamedTuple, TypeGuard

from mesp_ref.errors import MespRefError, shown
from mesp_ref.ops import RopeScaling

# The seven linear layers of a block that LoRA can adapt, by their path inside the block.
PROJECTIONS = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
PROJECTIONS |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


class Traits(NamedTuple):
    """What a family computes in its own way; each trait is used in one place of one half."""

    model_type: str
    # of each half: before it, and after it before the sum
    norms: tuple[tuple[str, str], ...] = ("input_layernorm", ""), ("post_attention_layernorm", "")
    biases: str = ""  # the letters of projections that always have one
    head_norms: bool = False  # q and k are normalised head by head before RoPE
    gelu: bool = False  # gelu(gate) ⊙ up in place of silu(gate) ⊙ up
    scaled_embedding: bool = False  # by √C
    gain: float = 0.0  # what files leave out of a norm's weight: 1 of 1 + w


_GEMMA_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_FAMILIES = (
    Traits("qwen2", biases="qkv"),
    Traits("llama"),
    Traits("smollm3"),
    Traits("qwen3", head_norms=True),
    Traits("gemma3_text", _GEMMA_NORMS, "", True, gelu=True, scaled_embedding=True, gain=1.0),
)
FAMILIES = {traits.model_type: traits for traits in _FAMILIES}
LAYER_TYPES = FULL, SLIDING, NO_ROPE = "full_attention", "sliding_attention", "no_rope"

# Beyond these no model exists, and what is counted or tabulated from them would not fit.
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
# Between these, float32 neither loses eps³ (RMSNorm's backward of a zero row) nor overflows an angle.
_RANGES = {"rms_norm_eps": (1e-30, 1e6), "rope_theta": (1.0, 1e30)}


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a model under their Hugging Face names: Qwen2's, unless `traits` say else.

    Letters elsewhere: C hidden_size, F intermediate_size, H num_attention_heads,
    G num_key_value_heads, D head_dim, V vocab_size.

    Raises MespRefError for sizes that cannot be: not positive, not dividing, an odd head_dim.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    traits: Traits = FAMILIES["qwen2"]
    attention_bias: bool = False  # q, k, v and o have biases, whatever the family
    rope_scaling: RopeScaling | None = None
    layer_types: tuple[str, ...] = ()  # of LAYER_TYPES, by layer; all are FULL without
    sliding_window: int | None = None  # keys that a query sees in a SLIDING layer, its own included
    rope_local_base_freq: float = 10_000.0  # rope_theta of those, which are not scaled
    attention_scale: float | None = None  # what attention multiplies scores with; 1/√D without
    source: str = "config"  # where it was read, for messages

    def __post_init__(self) -> None:
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value: object = getattr(self, field)
            top = _MOST.get(field, 2**31 - 1)
            if not _is_integer(value) or not 1 <= value <= top:
                self._refuse(field, value, f"a positive integer up to {top}")
        for field, (least, most) in _RANGES.items():
            found: object = getattr(self, field)
            if not (_is_integer(found) or isinstance(found, float)) or not least <= found <= most:
                self._refuse(field, found, f"a positive number from {least:g} to {most:g}")
        types = self.layer_types
        if not set(types) <= set(LAYER_TYPES) or 0 < len(types) < self.num_hidden_layers:
            self._refuse("layer_types", types, f"one of {', '.join(LAYER_TYPES)} for each layer")
        if SLIDING in types and not (self.sliding_window or 0) > 0:
            self._refuse("sliding_window", self.sliding_window, "a positive number of keys")
        for field in ("bos_token_id", "eos_token_id"):
            given: object = getattr(self, field)
            for token in given if isinstance(given, tuple) else (given,):
                if token is not None and not (_is_integer(token) and 0 <= token < 2**31):
                    self._refuse(field, token, "a token id")
        tied: object = self.tie_word_embeddings
        if not isinstance(tied, bool):
            self._refuse("tie_word_embeddings", tied, "true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            self._refuse("num_key_value_heads", self.num_key_value_heads, expected)
        if self.head_dim % 2:
            self._refuse("head_dim", self.head_dim, "an even number (RoPE turns pairs)")

    def _refuse(self, field: str, found: object, expected: str) -> None:
        raise MespRefError(f"{self.source}: {field}: found {shown(found)}, expected {expected}")

    def layer_type(self, layer: int) -> str:
        """One of LAYER_TYPES."""
        return self.layer_types[layer] if self.layer_types else FULL

    def angles(self, kind: str) -> tuple[float, RopeScaling | None]:
        """The base of RoPE and its scaling in layers of a kind."""
        if kind == SLIDING:
            return self.rope_local_base_freq, None
        return self.rope_theta, RopeScaling(inf) if kind == NO_ROPE else self.rope_scaling

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; empty when the config names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, in the order a forward meets them."""
        c, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        (before, after), (before_mlp, after_mlp) = self.traits.norms
        biases = "qkvo" if self.attention_bias else self.traits.biases
        block: dict[str, tuple[int, ...]] = {f"{before}.weight": (c,)}
        for letter, out, into in (("q", q, c), ("k", kv, c), ("v", kv, c), ("o", c, q)):
            block[f"self_attn.{letter}_proj.weight"] = (out, into)
            if letter in biases:
                block[f"self_attn.{letter}_proj.bias"] = (out,)
            if letter in "qk" and self.traits.head_norms:
                block[f"self_attn.{letter}_norm.weight"] = (d,)
        block |= {f"{norm}.weight": (c,) for norm in (after, before_mlp) if norm}
        block |= {"mlp.gate_proj.weight": (f, c), "mlp.up_proj.weight": (f, c)}
        block["mlp.down_proj.weight"] = (c, f)
        if after_mlp:
            block[f"{after_mlp}.weight"] = (c,)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, c)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        shapes["model.norm.weight"] = (c,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
