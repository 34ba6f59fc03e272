"""LoRA adapters as mlx-lm keeps them: transposed, with the scale itself in the configuration.

PEFT      base_model.model.model.layers.0.mlp.up_proj.lora_A.weight [R, in], …lora_B [out, R]
mlx-lm    model.layers.0.mlp.up_proj.lora_a [in, R], …lora_b [R, out]
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import check_adapter, check_rank, compute_dtype, parse_targets
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import new_directory, write_aside
from mesp_ref.files.peft import check_pairs, finite_matrices, open_matrices, read_matrix
from mesp_ref.files.strict import inside, read_object
from mesp_ref.files.tables import MLX_ADAPTER

_TENSOR = re.compile(r"(model\.layers\.([0-9]{1,6})\.(.+))\.lora_(a|b)")


def save_mlx_adapter(
    adapter: Adapter, path: str | Path, overwrite: bool = False, *, blocks: int | None = None
) -> None:
    """Write an mlx-lm adapter directory, whole or not at all: adapters.safetensors and
    adapter_config.json.

    Scale     s = alpha/R (alpha/√R with rank stabilisation) becomes lora_parameters.scale
    Blocks    mlx-lm counts them from the end, and refuses matrices of others: with `blocks`, how
              many the model has, an adapter that does not reach the last one is refused here
    Raises    MespRefError for that, for NaN and infinity, and for a place that holds anything, unless
              `overwrite` and mesp-ref wrote it
    """
    tensors = {}
    for name, array in finite_matrices(adapter).items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{module}.lora_{matrix[0].lower()}"] = np.ascontiguousarray(array.T)
    first, last = min(adapted_blocks(adapter)), max(adapted_blocks(adapter))
    if blocks is not None and last != blocks - 1:
        raise MespRefError(
            f"adapter: found matrices up to block {last}, expected some in the model's last, block "
            f"{blocks - 1}: mlx-lm adapts the last blocks of a model only"
        )
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": shared_name(adapter.base_model_name_or_path),
        "num_layers": last - first + 1,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": [PROJECTIONS[target] for target in adapter.targets],
        },
    }
    with new_directory(path, overwrite=overwrite) as folder:
        with write_aside(folder / "adapters.safetensors") as aside:
            save_file(tensors, aside, metadata={"format": "mlx"})
        with write_aside(folder / "adapter_config.json") as aside:
            aside.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def adapted_blocks(adapter: Adapter) -> set[int]:
    """The blocks in which an adapter has matrices."""
    return {int(name.split(".layers.")[1].split(".")[0]) for name in adapter.weights}


def load_mlx_adapter(
    path: str | Path, dtype: Any = "float32", config: Qwen2Config | None = None
) -> Adapter:
    """Read an mlx-lm adapter directory; blocks that it does not adapt stay as they are.

    Alpha     s·R, so that alpha/R is the scale of mlx-lm
    Raises    MespRefError naming file and field or tensor: DoRA, full fine-tunes, LoRA on other
              layers than the seven projections, an adapter of another model when `config` is given
    """
    directory, wanted = Path(path), compute_dtype(dtype)
    values = _read_config(inside(directory, "adapter_config.json"))
    file, weights = open_matrices(directory, "adapters.safetensors"), {}
    for name in file:
        match = _TENSOR.fullmatch(name)
        if match is None or match[3] not in PROJECTIONS.values():
            raise MespRefError(
                f"{file.path}: {name}: found, expected matrices "
                "model.layers.N.<projection>.lora_a|lora_b"
            )
        _check_adapted(match, values, file.path, config)
        weights[tensor_name(match[1], match[4].upper())] = read_matrix(file, name, wanted, True)
    targets = [t for t, p in PROJECTIONS.items() if any(f".{p}.lora_" in name for name in weights)]
    rank, scale = values["lora_parameters"]["rank"], values["lora_parameters"]["scale"]
    model = values.get("model", values.get("base_model_name_or_path"))
    adapter = Adapter(
        rank, scale * rank, parse_targets(targets), weights=weights, base_model_name_or_path=model
    )
    check_pairs(adapter, file.path)
    if config is not None:
        check_adapter(adapter, config, str(file.path))
    return adapter


def _check_adapted(
    match: re.Match[str], values: Mapping[str, Any], file: Path, config: Qwen2Config | None
) -> None:
    """A matrix that mlx-lm would not put anywhere: of a module or block that it does not adapt."""
    module, block, inner = match[1], int(match[2]), match[3]
    keys = values["lora_parameters"].get("keys", [inner])
    if module in keys:
        return
    if inner not in keys:
        raise MespRefError(
            f"{file}: {match[0]}: found, expected {inner} among lora_parameters.keys of "
            f"adapter_config.json, {shown(keys)}; mlx-lm adapts no other module"
        )
    layers = values.get("num_layers", values.get("lora_layers", 0))
    if config is not None and 0 < layers < config.num_hidden_layers - block:
        raise MespRefError(
            f"{file}: {match[0]}: found, expected matrices of the last {layers} blocks of "
            f"{config.num_hidden_layers} (num_layers in adapter_config.json); mlx-lm adapts no other"
        )


def _read_config(file: Path) -> dict[str, Any]:
    """The fields of adapter_config.json, with a rank and a scale."""
    given = read_object(file, "an mlx-lm adapter directory")
    values = read_fields(given, MLX_ADAPTER, file, "the engine computes plain LoRA only")
    parameters = values.get("lora_parameters")
    if parameters is None:
        raise MespRefError(f"{file}: lora_parameters: found None, expected rank and scale")
    rank, scale = parameters.get("rank"), parameters.get("scale")
    check_rank(rank, scale, f"{file}: lora_parameters.rank")
    return values
