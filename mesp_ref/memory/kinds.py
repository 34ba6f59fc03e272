"""Living bytes by the kind of tensor they belong to: what a picture of a ledger is coloured by."""

from collections import Counter

from mesp_ref.memory.ledger import Entry, Moment

RESIDUAL = "residual stream"
NORM = "norms"
QKV = "q, k, v"
PROBABILITIES = "probabilities"
OUTPUT = "attention output"
GATE_UP = "gate, up"
SILU_Z = "silu, z"
LORA_H = "h"
DX = "activation gradients"
LORA_GRADIENTS = "LoRA gradients"
REST = "labels, angles, loss"

# In the order of a block: the first lies at the bottom of a stacked picture.
KINDS = (
    RESIDUAL, NORM, QKV, PROBABILITIES, OUTPUT, GATE_UP, SILU_Z, LORA_H, DX, LORA_GRADIENTS,
    REST,
)  # fmt: skip

_PARTS = {
    "q_proj": QKV, "k_proj": QKV, "v_proj": QKV, "gate_proj": GATE_UP, "up_proj": GATE_UP,
    "o_proj": RESIDUAL, "down_proj": RESIDUAL,
}  # fmt: skip
_ARGUMENTS = {"q_proj": NORM, "gate_proj": NORM, "o_proj": OUTPUT, "down_proj": SILU_Z}
_OPS = {
    "rmsnorm": NORM, "rope": QKV, "attention": OUTPUT, "swiglu": SILU_Z, "geglu": SILU_Z,
    "embedding": RESIDUAL, "streamed_attention": OUTPUT, "mlp": RESIDUAL, "rope_tables": REST,
    "lm_loss": REST,
}  # fmt: skip

_TAKEN = {
    "rmsnorm(x)": RESIDUAL, "lm_loss(labels)": REST, "attention(first)": REST, "rope(cos)": REST,
    "rope(sin)": REST, "streamed_attention(first)": REST, "streamed_attention(k)": QKV,
    "streamed_attention(v)": QKV,
}  # fmt: skip


def kind(entry: Entry, rank: int) -> str:
    """One of KINDS: what a buffer of a training step holds, from the tag that the ledger gave it.

    A sum formed between ops, such as a residual x + o, is tagged as the argument in which the next
    op takes it: rmsnorm(x) is the residual stream, rmsnorm_bwd(dy) a gradient.
    `rank` tells dA [R, in] and dB [out, R] from the other results of a backward.

    Raises KeyError for a tag that no op of a step makes.
    """
    op, _, part = entry.tag.partition(" ")  # "lora_linear mlp.gate_proj.h"
    op, _, argument = op.partition("(")  # "rmsnorm(x)"
    op, _, field = op.partition(".")  # "attention.p"
    part, _, taken = part.partition("(")
    name = next((p for p in _PARTS if p in part), "")
    if op.endswith("_bwd"):
        is_lora = len(entry.shape) == 2 and rank in entry.shape and not (argument or taken)
        return LORA_GRADIENTS if is_lora and op in ("lora_linear_bwd", "mlp_bwd") else DX
    if part.endswith(".h"):
        return LORA_H
    if name:
        return _ARGUMENTS[name] if taken else _PARTS[name]
    if field in ("p", "lse"):
        return PROBABILITIES if "attention" in op else REST
    if (op, field) == ("lm_loss", "dx"):
        return DX
    if argument:
        return _TAKEN[f"{op}({argument}"]
    return _OPS[op]


def by_kind(moment: Moment, rank: int) -> Counter[str]:
    """Bytes alive by kind when an op is called; they sum to `moment.held`."""
    found: Counter[str] = Counter()
    for entry in moment.live:
        found[kind(entry, rank)] += entry.nbytes
    return found
