"""LoRA adapters: initialisation, PEFT directories."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mesp_ref.config import PROJECTIONS, Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array
from mesp_ref.reading import inside, read_object, shown
from mesp_ref.weights import MappedFile, compute_dtype, write_aside

_TENSOR = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,6})\.(.+)\.lora_(A|B)\.weight")


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


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write a PEFT directory: adapter_model.safetensors and adapter_config.json.

    Each file appears whole or not at all. float32 and float64 are stored as they are.
    """
    directory = Path(path)
    tensors = {name: np.ascontiguousarray(array) for name, array in adapter.weights.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapter.targets),
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }
    with write_aside(directory / "adapter_config.json") as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # The weights last: a save of the same run that fails leaves the adapter of the save before.
    with write_aside(directory / "adapter_model.safetensors") as aside:
        save_file(tensors, aside, metadata={"format": "pt"})


# Features of PEFT that change the mathematics, and the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # Others (pissa, olora, corda, loftq, …) also changed the base weights they were made from.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


def _read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, refused by field where it asks for what the engine does not compute."""
    values = read_object(file, "a PEFT adapter directory")
    if values.get("peft_type") != "LORA":
        raise MespRefError(
            f"{file}: peft_type: found {shown(values.get('peft_type'))}, expected 'LORA'"
        )
    for name, unused in _UNUSED.items():
        if values.get(name) not in unused:
            raise MespRefError(
                f"{file}: {name}: found {shown(values[name])}, expected {unused[0]!r}; "
                "the engine computes plain LoRA only"
            )
    check_rank(values.get("r"), values.get("lora_alpha"), f"{file}: r")
    return values


def load_adapter(
    path: str | Path, dtype: Any = "float32", config: Qwen2Config | None = None
) -> Adapter:
    """Read a PEFT directory into writable arrays.

    With `config` the adapter is held against that model, so that an adapter of another model is
    refused here and not in the middle of a GEMM.

    Raises MespRefError naming the file and the field or tensor.
    """
    directory, wanted = Path(path), compute_dtype(dtype)
    values = _read_adapter_config(inside(directory, "adapter_config.json"))
    file = MappedFile(inside(directory, "adapter_model.safetensors"))
    weights = {}
    for name in file:
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in PROJECTIONS.values():
            raise MespRefError(
                f"{file.path}: {name}: found, expected "
                "base_model.model.model.layers.N.<projection>.lora_A|lora_B.weight"
            )
        weights[name] = read_matrix(file, name).astype(wanted)  # a writable copy
    targets = [t for t, p in PROJECTIONS.items() if any(f".{p}.lora_" in name for name in weights)]
    base = values.get("base_model_name_or_path")
    adapter = Adapter(
        values["r"], float(values["lora_alpha"]), parse_targets(targets),
        bool(values.get("use_rslora")), weights, base if isinstance(base, str) else None,
    )  # fmt: skip
    check_pairs(adapter, file.path)
    if config is not None:
        check_adapter(adapter, config, str(file.path))
    return adapter


def read_matrix(file: MappedFile, name: str) -> Array:
    """A tensor as stored; MespRefError for one that is no matrix of a floating type."""
    raw = file.raw(name)
    if raw.ndim != 2 or raw.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise MespRefError(
            f"{file.path}: {name}: found {raw.dtype} {list(raw.shape)}, expected a matrix of a "
            "floating type"
        )
    return raw


def check_pairs(adapter: Adapter, file: Path) -> None:
    """Every A has its B, and both have the rank of the configuration."""
    for name, array in adapter.weights.items():
        is_a = name.endswith("lora_A.weight")
        partner = name.replace("lora_A", "lora_B") if is_a else name.replace("lora_B", "lora_A")
        if partner not in adapter.weights:
            raise MespRefError(f"{file}: {partner}: missing, expected beside {name}")
        if array.ndim != 2 or array.shape[0 if is_a else 1] != adapter.rank:
            raise MespRefError(
                f"{file}: {name}: shape: found {list(array.shape)}, expected rank {adapter.rank} "
                "as adapter_config.json says"
            )


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
