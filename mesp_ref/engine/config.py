"""The sizes and constants of a Qwen2 model, checked when they are given."""

from dataclasses import dataclass
from typing import TypeGuard

from mesp_ref.errors import MespRefError, shown

# The seven linear layers of a block that LoRA can adapt, by their path inside the block.
PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}

# Beyond these no model exists, and what is counted or tabulated from them would not fit.
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
# Between these, float32 neither loses eps³ (RMSNorm's backward of a zero row) nor overflows an angle.
_RANGES = {"rms_norm_eps": (1e-30, 1e6), "rope_theta": (1.0, 1e30)}


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 model under their Hugging Face names.

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
    source: str = "config"  # where it was read, for messages

    def __post_init__(self) -> None:
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value: object = getattr(self, field)
            if not _is_integer(value) or not 1 <= value <= _MOST.get(field, 2**31 - 1):
                self._refuse(
                    field, value, f"a positive integer up to {_MOST.get(field, 2**31 - 1)}"
                )
        for field, (least, most) in _RANGES.items():
            number: object = getattr(self, field)
            if (
                not (_is_integer(number) or isinstance(number, float))
                or not least <= number <= most
            ):
                self._refuse(field, number, f"a positive number from {least:g} to {most:g}")
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
        block = {
            "input_layernorm.weight": (c,),
            "self_attn.q_proj.weight": (q, c),
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.weight": (kv, c),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, c),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (c, q),
            "post_attention_layernorm.weight": (c,),
            "mlp.gate_proj.weight": (f, c),
            "mlp.up_proj.weight": (f, c),
            "mlp.down_proj.weight": (c, f),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, c)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        shapes["model.norm.weight"] = (c,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
