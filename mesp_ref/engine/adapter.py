"""LoRA adapters: their matrices under PEFT's names, and how they begin."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.weights import compute_dtype
from mesp_ref.errors import MespRefError, shown
from mesp_ref.ops import Array


@dataclass
class Adapter:
    """LoRA matrices of a model under their PEFT tensor names.

    `weights` maps base_model.model.model.layers.N.….lora_A.weight [R, in] and …lora_B.weight
    [out, R] to writable arrays; optimisers update them in place.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    weights: dict[str, Array] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

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
        return Adapter(
            self.rank, self.alpha, self.targets, self.use_rslora, weights,
            self.base_model_name_or_path,
        )  # fmt: skip


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's name of LoRA matrix "A" or "B" of a module."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def adapter_shapes(
    config: Qwen2Config, rank: int, targets: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """PEFT name and shape of every LoRA matrix, block by block: A [R, in], B [out, R]."""
    weights, targets = config.weight_shapes(), set(targets)
    shapes = {}
    for i in range(config.num_hidden_layers):
        for target, path in PROJECTIONS.items():
            if target in targets:
                module = f"model.layers.{i}.{path}"
                out_features, in_features = weights[f"{module}.weight"]
                shapes[tensor_name(module, "A")] = (rank, in_features)
                shapes[tensor_name(module, "B")] = (out_features, rank)
    return shapes


def parse_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """ "all", "q_proj,v_proj" or an iterable of names, in the order of a block.

    Raises MespRefError for a name that is not one of the seven projections, and for none at all.
    """
    if isinstance(targets, str):
        targets = PROJECTIONS if targets in ("all", "all-linear") else targets.split(",")
    asked = [name.strip() for name in targets]
    for name in asked:
        if name not in PROJECTIONS:
            raise MespRefError(
                f"targets: found {name!r}, expected 'all' or names among {', '.join(PROJECTIONS)}"
            )
    if not asked:
        raise MespRefError("targets: found none, expected 'all' or at least one projection")
    return tuple(name for name in PROJECTIONS if name in asked)


def check_rank(rank: object, alpha: object, where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MespRefError(f"{where}: found {shown(rank)}, expected a rank of 1 or more")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise MespRefError(f"{where}: alpha: found {shown(alpha)}, expected a finite number")


def init_lora(
    config: Qwen2Config,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = "all",
    seed: int = 0,
    b_std: float = 0.0,
    use_rslora: bool = False,
    dtype: Any = "float32",
) -> Adapter:
    """A fresh adapter as PEFT initialises it: A uniform in ±1/√in, B zero.

    B = 0 makes the adapted model equal to its base and dA exactly 0; `b_std` > 0 draws B from
    normal(0, b_std) for checks in which every gradient must be alive.

    Raises MespRefError for a rank below 1, alpha not finite or unknown targets.
    Source    PEFT LoraLayer.reset_lora_parameters: kaiming_uniform(a=√5) is uniform ±1/√in
    """
    check_rank(rank, alpha, "rank")
    wanted, names = compute_dtype(dtype), parse_targets(targets)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in adapter_shapes(config, rank, names).items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(shape[1])
            weights[name] = rng.uniform(-bound, bound, shape).astype(wanted)
        else:
            weights[name] = (rng.standard_normal(shape) * b_std).astype(wanted)
    return Adapter(rank, float(alpha), names, use_rslora, weights)


def check_adapter(adapter: Adapter, config: Qwen2Config, where: str = "adapter") -> None:
    """Raise MespRefError when a LoRA matrix does not fit the model: another shape or layer."""
    expected = adapter_shapes(config, adapter.rank, adapter.targets)
    for name, array in adapter.weights.items():
        if array.shape != expected.get(name):
            raise MespRefError(
                f"{where}: {name}: found {list(array.shape)}, expected "
                f"{list(expected[name]) if name in expected else 'no such tensor'} "
                f"for {config.source}; the adapter belongs to another model"
            )
