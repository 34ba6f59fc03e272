"""LoRA adapters: A, B and the scale of every adapted projection, under PEFT's names."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from mesp_ref.ops import Array


@dataclass
class Adapter:
    """LoRA matrices of a model under their PEFT tensor names.

    `weights` maps base_model.model.model.layers.N.….lora_A.weight [R, in] and …lora_B.weight
    [out, R] to writable arrays; optimisers update them in place.
    `revision` is the branch, tag or commit of the base model, where it was given with one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    weights: dict[str, Array] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @property
    def scale(self) -> float:
        """s = alpha/R, or alpha/√R with rank stabilisation (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def pair(self, module: str) -> tuple[Array, Array] | None:
        """A and B of a module such as model.layers.0.self_attn.q_proj; None where it has none."""
        A = self.weights.get(tensor_name(module, "A"))
        return None if A is None else (A, self.weights[tensor_name(module, "B")])

    def astype(self, dtype: Any) -> "Adapter":
        """A copy in another compute dtype."""
        weights = {name: array.astype(dtype) for name, array in self.weights.items()}
        return replace(self, weights=weights)


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's name of LoRA matrix "A" or "B" of a module."""
    return f"base_model.model.{module}.lora_{matrix}.weight"
