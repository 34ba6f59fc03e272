"""Which tensors make the difference between the peaks of two methods, byte for byte."""

from collections import Counter
from typing import NamedTuple

from cells import Peak

H = "h = x·Aᵀ of the LoRA layers"
_NAMES = {
    "swiglu": "z, the input of down_proj",
    "swiglu.silu": "silu(gate)",
    "rope": "q and k after RoPE",
    "lora_linear self_attn.v_proj": "v",
    "attention.p": "attention probabilities",
    "lora_linear mlp.gate_proj": "gate",
    "lora_linear mlp.up_proj": "up",
    "rmsnorm": "outputs of the norms",
    "rmsnorm(x)": "checkpoints, and the sum after attention",
    "embedding": "the first checkpoint",
    "lora_linear self_attn.o_proj(x)": "attention output",
    "rope_tables": "RoPE angles",
    "rmsnorm_bwd": "gradient at a norm's input",
    "rmsnorm_bwd(dy)": "gradient at a norm's output",
}


class Step(NamedTuple):
    """One bar of a waterfall."""

    name: str
    size: int  # bytes that the bigger one holds and the smaller does not; negative: the reverse


def tensor(tag: str) -> str:
    """A ledger tag in the words of a reader; a tag that is not known stays as it is."""
    if tag.endswith(".h"):
        return H
    if tag.startswith("lora_linear_bwd "):
        return f"gradients from {tag.split('.')[-1]}: of its input, A and B"
    return _NAMES.get(tag, tag)


def contents(peak: Peak) -> Counter[str]:
    """All bytes of a peak by name: what was alive, and what the running op added."""
    found: Counter[str] = Counter()
    for tag, size in peak.held.items():
        found[tensor(tag)] += size
    found[f"{peak.op}: results and scratch"] += peak.added
    return found


def waterfall(bigger: Peak, smaller: Peak) -> list[Step]:
    """The steps from one peak down to the other, largest first; they add up exactly."""
    here, there = contents(bigger), contents(smaller)
    steps = [Step(name, here[name] - there[name]) for name in here | there]
    return sorted((step for step in steps if step.size), key=lambda step: -step.size)
